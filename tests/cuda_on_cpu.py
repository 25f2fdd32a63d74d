"""CUDA source run without a GPU: each thread of a block is a thread of the CPU, blocks come one after the other.

What is run is the text that a GPU's compiler would be given, without its preamble; warps and their order are not
modelled. Matrix fragments are whole matrices in each thread.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grape_compile.kernels.tensorir import engine

COMPILER = shutil.which("g++")
_SHIM = r"""
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
typedef _Float16 half;
typedef unsigned char uchar;
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __align__(n) alignas(n)
#define __restrict__
struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> gate;
static void __syncthreads() { gate->arrive_and_wait(); }
template <class A, class B> static auto min(A a, B b) -> std::common_type_t<A, B> { return a < b ? a : b; }
template <class A, class B> static auto max(A a, B b) -> std::common_type_t<A, B> { return a > b ? a : b; }
static const float CUDART_INF_F = INFINITY;
#define __expf expf
static float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
namespace nvcuda::wmma {
struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K, class T, class Order = row_major> struct fragment { float at[16][16]; };
template <class F> void fill_fragment(F &f, float value) {
  for (auto &row : f.at)
    for (auto &each : row) each = value;
}
template <class Use, int M, int N, int K, class T, class Order>
void load_matrix_sync(fragment<Use, M, N, K, T, Order> &f, const T *from, int stride) {
  constexpr bool rows = std::is_same_v<Order, row_major>;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) f.at[i][j] = (float)(rows ? from[i * stride + j] : from[j * stride + i]);
}
template <class C, class A, class B, class D> void mma_sync(C &c, const A &a, const B &b, const D &d) {
  C sum;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      sum.at[i][j] = d.at[i][j];
      for (int k = 0; k < 16; ++k) sum.at[i][j] += a.at[i][k] * b.at[k][j];
    }
  c = sum;
}
template <class F> void store_matrix_sync(float *to, const F &f, int stride, layout_t order) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) (order == mem_row_major ? to[i * stride + j] : to[j * stride + i]) = f.at[i][j];
}
}
alignas(128) uchar buf_dyn_shmem_ptr[1 << 18];
static void launch(int gx, int gy, int threads, void (*body)(void **), void **args) {
  gate = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t)
    all.emplace_back([=] {
      threadIdx = {t, 0, 0};
      for (int y = 0; y < gy; ++y)
        for (int x = 0; x < gx; ++x) {
          blockIdx = {x, y, 0};
          body(args);
          gate->arrive_and_wait();
        }
    });
  for (auto &each : all) each.join();
}
"""
_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\((.*)\) \{$', re.M)


def source_of(functions: Mapping[str, Any], target: str) -> str:
    """The CUDA source of functions for a GPU that need not be there."""
    chosen = engine.to_target(target)
    return engine.cuda_source(engine.compile_module(engine.module_of(functions), chosen))


def run(function: Any, arrays: Mapping[str, np.ndarray[Any, Any]], folder: Path, target: str) -> None:
    """Run the kernels of a function, whose sizes are all known, one after the other on named arrays."""
    text = source_of({"kernel": function}, target)
    text = text[text.rindex("#define ushort unsigned short") :].split("#endif", 1)[1]
    text = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", text)
    memory = dict(arrays)
    code = [_SHIM, text.replace("extern __shared__ __align__(64) uchar buf_dyn_shmem_ptr[];", "")]
    kernels = _KERNEL.findall(text)
    for name, signature in kernels:
        kinds = [each.strip().rsplit(" ", 1) for each in signature.split(",")]
        values = ", ".join(f"({kind.replace('__restrict__', '')})a[{i}]" for i, (kind, _) in enumerate(kinds))
        code.append(f"static void call_{name}(void **a) {{ {name}({values}); }}")
        code.append(
            f'extern "C" void run_{name}(int gx, int gy, int threads, void **a)'
            f" {{ launch(gx, gy, threads, call_{name}, a); }}"
        )
    (folder / "kernel.cpp").write_text("\n".join(code))
    library = folder / "kernel.so"
    command = [COMPILER or "g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run(
        [*command, "-o", str(library), str(folder / "kernel.cpp")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:4000]
    loaded = ctypes.CDLL(str(library))
    for (name, signature), (gx, gy, threads) in zip(kernels, launches(function), strict=True):
        names = [each.strip().rsplit(" ", 1)[1].removesuffix("_ptr") for each in signature.split(",")]
        for each in names:
            # What a kernel leaves for the next one.
            memory.setdefault(each, np.full(1 << 20, np.nan))
        pointers = (ctypes.c_void_p * len(names))(*[memory[each].ctypes.data for each in names])
        getattr(loaded, f"run_{name}")(gx, gy, threads, pointers)


def launches(function: Any) -> list[tuple[int, int, int]]:
    """(blocks along x, blocks along y, threads) of each kernel of a function."""
    found: list[dict[str, int]] = [{}]

    def visit(node: Any) -> None:
        for each in getattr(node, "seq", ()):
            visit(each)
        inner = getattr(node, "body", None) or getattr(node, "block", None)
        bound = getattr(node, "thread_binding", None)
        if bound is not None:
            found[-1][str(bound.thread_tag)] = int(node.extent)
        if inner is not None:
            visit(inner)
        if bound is not None and bound.thread_tag == "blockIdx.x":
            found.append({})

    visit(function.body)
    return [(each["blockIdx.x"], each.get("blockIdx.y", 1), each["threadIdx.x"]) for each in found[:-1]]
