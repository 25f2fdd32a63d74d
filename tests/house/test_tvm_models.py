"""The table of whole models is what was measured."""

from benchmarks.tvm_models import BEGIN, COMPILED, EAGER, END, LIBRARY, PAGE, filled


def test_a_table_takes_the_place_of_the_one_before() -> None:
    seconds = {LIBRARY: {"median": 0.00123}, EAGER: {"median": 0.0045}, COMPILED: {"median": 0.0021}}
    rows = [{"family": "gptj", "tokens": 1, "past": past, "seconds": seconds} for past in (0, 512)]
    page = filled(f"before\n{BEGIN}old\n{END}behind\n", {"rows": rows})
    assert page.startswith(f"before\n{BEGIN}| model | tokens | library | eager | torch.compile |\n")
    assert page.endswith(f"| GPT-J | 1 behind 512 | 1.23 | 4.5 | 2.1 |\n{END}behind\n")
    assert "| GPT-J | 1 | 1.23 | 4.5 | 2.1 |\n" in page
    assert "old" not in page
    text = PAGE.read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)
