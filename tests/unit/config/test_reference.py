from pathlib import Path

from distill_system.config.reference import render_reference

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "run `make docs`"


def test_a_row_holds_key_type_default_and_meaning() -> None:
    page = render_reference()
    assert "| `seed` | a whole number >= 0 | `0` | Every random choice of the run" in page
    assert "| `steps` | a whole number > 0 | **required** | Learner steps. |" in page


def test_a_union_lists_its_alternatives_with_links_that_exist() -> None:
    page = render_reference()
    assert "by `type`: [embedded](#embeddedsource), [files](#filessource)," in page
    assert "## EmbeddedSource\n" in page
    assert "## JsonlSource\n" in page


def test_a_list_of_alternatives_has_links_that_exist() -> None:
    page = render_reference()
    assert "a list, each item by `type`: [hidden_matching](#hiddenmatchingconfig)," in page
    assert "## HiddenMatchingConfig\n" in page
    assert "Stands at `distill.objective.terms[]`." in page


def test_every_key_is_explained() -> None:
    rows = [line for line in render_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert [row for row in rows if row.endswith("|  |")] == []
