// Generate text with a library that `grape-compile export tvm --kv-cache` wrote: TVM's runtime, no Python.
//
//     make run_tvm          (or the line of g++ in docs/tvm.md)
//     ./run_tvm model.so 16 5 17 42
//
// prints 16 greedy tokens after 5 17 42.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int kPooled = 2;  // how the virtual machine allocates

// Memory for tensors, aligned as the code of a CPU expects it.
struct Memory {
  void AllocData(DLTensor* tensor) {
    size_t bytes = std::max<size_t>(ffi::GetDataSize(*tensor), 1);
    tensor->data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

ffi::Tensor Empty(const std::vector<int64_t>& shape, DLDataType dtype) {
  return ffi::Tensor::FromNDAlloc(Memory(), ffi::Shape(shape), dtype, kCpu);
}

ffi::Tensor Row(const std::vector<int64_t>& values) {
  ffi::Tensor row = Empty({1, static_cast<int64_t>(values.size())}, DLDataType{kDLInt, 64, 1});
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(row.data_ptr()));
  return row;
}

// What Artifact.save says of one argument.
struct Value {
  std::string name, dtype;
  std::vector<int64_t> shape;  // -1 where a size is open
};

std::vector<Value> Inputs(const ffi::json::Object& about) {
  std::vector<Value> found;
  for (const ffi::Any& each : about["inputs"].cast<ffi::json::Array>()) {
    auto value = each.cast<ffi::json::Object>();
    Value one{value["name"].cast<ffi::String>(), value["dtype"].cast<ffi::String>(), {}};
    for (const ffi::Any& size : value["shape"].cast<ffi::json::Array>()) {
      one.shape.push_back(size.as<int64_t>().value_or(-1));
    }
    found.push_back(one);
  }
  return found;
}

// A machine that is ready to run, and the weights in the order in which `main` takes them.
struct Model {
  ffi::Module machine;
  ffi::Function main;
  ffi::Array<ffi::Any> weights;
  std::vector<Value> inputs;
};

Model Load(std::string path) {
  // A name without a folder would be looked for where the system keeps its libraries.
  if (path.find('/') == std::string::npos) path = "./" + path;
  std::ifstream file(path + ".json");
  std::stringstream text;
  text << file.rdbuf();
  auto about = ffi::json::Parse(text.str()).cast<ffi::json::Object>();

  auto machine = (*ffi::Module::LoadFromFile(path)->GetFunction("vm_load_executable", true))().cast<ffi::Module>();
  (*machine->GetFunction("vm_initialization", true))(static_cast<int>(kCpu.device_type), 0, kPooled);

  auto read = ffi::Function::GetGlobalRequired("runtime.LoadParamsFromFile");
  auto held = read(path + ".params").cast<ffi::Map<ffi::String, ffi::Any>>();
  ffi::Array<ffi::Any> weights;
  auto files = about["files"].cast<ffi::json::Object>();
  for (const ffi::Any& name : files["weights"].cast<ffi::json::Array>()) {
    weights.push_back(held[name.cast<ffi::String>()]);
  }
  return {machine, *machine->GetFunction("main", true), weights, Inputs(about)};
}

int64_t Likeliest(const ffi::Tensor& logits) {
  int64_t rows = logits.size(1), count = logits.size(2);
  const float* last = static_cast<const float*>(logits.data_ptr()) + (rows - 1) * count;
  return std::max_element(last, last + count) - last;
}

void Generate(const Model& model, int count, std::vector<int64_t> ids) {
  std::vector<ffi::Any> cache;
  for (const Value& value : model.inputs) {
    if (value.name.rfind("past_key_values.", 0) == 0) {
      if (value.dtype != "float32") throw std::runtime_error("this example reads logits in float32");
      cache.push_back(Empty({1, value.shape[1], 0, value.shape[3]}, DLDataType{kDLFloat, 32, 1}));
    }
  }
  int64_t seen = 0;
  for (int made = 0; made < count; ++made) {
    std::vector<int64_t> positions;
    for (size_t at = 0; at < ids.size(); ++at) positions.push_back(seen++);
    // ids, a mask over all tokens, the positions of the new ones, the cache, and the weights as one argument.
    std::vector<ffi::Any> arguments{Row(ids), Row(std::vector<int64_t>(seen, 1)), Row(positions)};
    arguments.insert(arguments.end(), cache.begin(), cache.end());
    arguments.push_back(model.weights);
    std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
    ffi::Any result;
    model.main.CallPacked(views.data(), static_cast<int>(views.size()), &result);
    auto results = result.cast<ffi::Array<ffi::Any>>();
    ids = {Likeliest(results[0].cast<ffi::Tensor>())};
    cache.assign(results.begin() + 1, results.end());
    std::cout << ids[0] << (made + 1 < count ? " " : "\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "run_tvm model.so COUNT TOKEN...\n";
    return 2;
  }
  try {
    std::vector<int64_t> prompt;
    for (int at = 3; at < argc; ++at) prompt.push_back(std::atoll(argv[at]));
    Generate(Load(argv[1]), std::atoi(argv[2]), prompt);
  } catch (const std::exception& failure) {
    std::cerr << failure.what() << "\n";
    return 1;
  }
  return 0;
}
