"""What stands on the pages of docs/ and in README.md works: commands, recipes' fragments and Python.

Commands are read by the parsers of the scripts that they start, with the recipes and keys that they name; what needs a
GPU, the hub or files of the reader is marked (`tests/helpers/doc_pages.py`).
"""

import ast
import contextlib
import io
import re

import pytest

from tests.helpers import ROOT, doc_checks
from tests.helpers.doc_checks import Page, Wrong
from tests.helpers.doc_pages import Block, blocks, commands, inline_commands, pages

PAGES = pages()


def of(path, language):
    page = str(path.relative_to(ROOT))
    return [b for b in blocks(path.read_text("utf-8"), page) if b.language == language]


@pytest.mark.parametrize("path", [p for p in PAGES if of(p, "sh")], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_its_script_takes(path, monkeypatch):
    page = Page()
    for block in of(path, "sh"):
        doc_checks.check_block(block, page, monkeypatch)


def inline(path):
    return inline_commands(path.read_text("utf-8"), str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", [p for p in PAGES if inline(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_command_in_running_text_is_one_that_its_script_takes(path, monkeypatch):
    for block in inline(path):
        doc_checks.check_block(block, Page(), monkeypatch)


@pytest.mark.parametrize("path", [p for p in PAGES if of(p, "yaml")], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_fragment_of_a_recipe_has_known_keys(path):
    for block in of(path, "yaml"):
        doc_checks.check_yaml(block)


@pytest.mark.parametrize("path", [p for p in PAGES if of(p, "python")], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_python_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in of(path, "python"):
        if block.needs:
            doc_checks.check_marked_python(block)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, str(block), "exec"), names)


def test_the_pages_are_found_and_hold_commands():
    shown = [block for path in PAGES for block in (*of(path, "sh"), *inline(path))]
    everything = [words for block in shown for words in commands(block)]
    started = {word for words in everything for word in words if word.startswith(("launchers/", "data_prep/"))}
    shipped = {f"launchers/{p.name}" for p in (ROOT / "launchers").glob("*.py") if not p.name.startswith("_")}
    # A command that no page shows is not to be found. These three are started by make.
    assert shipped - started <= {"launchers/few_shot_emoji.py", "launchers/compare.py", "launchers/demo.py"}
    assert len(PAGES) > 20 and len(everything) > 50


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python launchers/train.py --recipe recipes/quickstart.yaml --chekc", "--chekc"),
        ("python launchers/nothing.py --recipe recipes/quickstart.yaml", "launchers/nothing.py"),
        ("python launchers/train.py --recipe recipes/nothing.yaml", "recipes/nothing.yaml"),
        ("python launchers/train.py --recipe R.yaml --set optim.lrr=1", "optim.lrr"),
        ("python launchers/train.py --recipe R.yaml --set engine.deepspeed=ds_configs/zero9.json", "zero9.json"),
        ("deepspeed --gpus 2 launchers/train.py --recipe R.yaml", "--gpus"),
        ("torchrun --nproc 2 launchers/train.py --recipe R.yaml", "--nproc"),
        ("python launchers/evaluate.py --run runs/nothing --spilt test", "--spilt"),
        ("python launchers/predict.py --adapter data/other/adapter --images photos", "data/other/adapter"),
        ("python data_prep/prepare.py jsonl --trian a.jsonl --out data/a", "--trian"),
        ("python launchers/features.py --data data/stamps --out x --backbone clip --set modle=a", "modle"),
        ("make demmo", "demmo"),
        ("srun python launchers/train.py --recipe R.yaml", "needs: cluster"),
    ],
)
def test_a_command_that_does_not_work_is_noticed(text, words, monkeypatch):
    (block,) = blocks(f"```sh\n{text}\n```\n", "page.md")
    with pytest.raises(Wrong, match=words.replace(".", r"\.")):
        doc_checks.check_block(block, Page(), monkeypatch)
    (indented,) = blocks(f"    {text}\n", "page.md")
    assert indented.language == "sh" and commands(indented) == commands(block)


def test_a_mark_counts_for_the_next_block_alone():
    first, second = blocks("<!-- needs: hub, GPU -->\n```sh\nmake demo\n```\n\n```sh\nmake demo\n```\n", "page.md")
    assert first.needs == {"hub", "GPU"} and not second.needs
    (other,) = blocks("<!-- needs: hub -->\n\nWords between.\n\n```sh\nmake demo\n```\n", "page.md")
    assert not other.needs
    wrong = Block("page.md", 1, "sh", "make demo", frozenset({"luck"}))
    with pytest.raises(Wrong, match="luck"):
        doc_checks.check_block(wrong, Page(), pytest.MonkeyPatch())


def test_what_a_command_makes_may_be_used_below_it(monkeypatch):
    text = "```sh\npython data_prep/prepare.py stamps --out data/new\npython data_prep/show.py data/new\n```\n"
    (block,) = blocks(text, "page.md")
    doc_checks.check_block(block, Page(), monkeypatch)
    turned = Block("page.md", 1, "sh", "\n".join(reversed(block.text.splitlines())), frozenset())
    with pytest.raises(Wrong, match="nothing on this page makes data/new"):
        doc_checks.check_block(turned, Page(), monkeypatch)


def test_a_wrong_key_in_a_fragment_is_noticed():
    study = (
        "few_shot: {shots: [1], seeds: [1], tests: [{name: a, dir: b}]}\n"
        "methods: [{name: a, method: {name: coop, x: 1}}]"
    )
    for text in ("method: {name: p_adapter, pp: 1}", "optim: {lrr: 1}", "task: {name: vqa, los: ce}", study):
        (block,) = blocks(f"```yaml\n{text}\n```\n", "page.md")
        with pytest.raises(Wrong, match="unknown key"):
            doc_checks.check_yaml(block)


def test_a_marked_block_of_python_must_still_name_what_exists():
    (block,) = blocks("<!-- needs: hub -->\n```python\nmmpeft_ds.RoutedLoraConfig(rank=3)\n```\n", "page.md")
    with pytest.raises(TypeError):
        doc_checks.check_marked_python(block)
    (block,) = blocks("<!-- needs: hub -->\n```python\nfrom mmpeft_ds import nothing\n```\n", "page.md")
    with pytest.raises(ImportError):
        doc_checks.check_marked_python(block)


def test_a_wrong_command_in_running_text_is_noticed(monkeypatch):
    text = (
        "Say `python launchers/train.py --recipe R.yaml --chekc`.\n\n| a |\n|---|\n| `python launchers/no.py -x` |\n"
    )
    wrong = inline_commands(text, "page.md")
    assert len(wrong) == 2
    for block in wrong:
        with pytest.raises(Wrong):
            doc_checks.check_block(block, Page(), monkeypatch)


def test_every_recipe_has_a_row_and_every_page_a_place():
    """docs/recipes.md names every recipe with the command of its header; the site's sections name every page."""
    rows = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) > 10 and not [p.stem for p in recipes if f"| `{p.stem}` |" not in rows]
    listed = " ".join(p.read_text("utf-8") for p in (ROOT / "docs" / "sections").glob("*.md"))
    flat = [p.stem for p in (ROOT / "docs").glob("*.md") if p.stem != "index"]
    assert not [name for name in flat if f"../{name}\n" not in listed]


def test_what_troubleshooting_quotes_is_what_the_code_says():
    """Each quoted part of a heading stands in a text of the code, or of the constraints."""
    texts = {(ROOT / "constraints" / "cpu.txt").read_text("utf-8")}
    for path in (p for folder in ("mmpeft_ds", "launchers", "data_prep") for p in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        texts |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = [
        q for heading in re.findall(r"^### (.*)$", page, re.MULTILINE) for q in re.findall(r"`([^`]+)`", heading)
    ]
    assert len(quoted) > 20

    def said(quote):
        return any(all(part.strip() in text for part in quote.split("...")) for text in texts)

    assert not [quote for quote in quoted if not said(quote)] and not said("a line that nothing says")


def not_there(text):
    """Files of this project, and functions in them, that the prose of a page names and that are not there."""
    folders = [ROOT, ROOT / "mmpeft_ds", ROOT / "data_prep"]
    rooms = {p.name for folder in folders for p in folder.iterdir() if p.is_dir()}
    prose = re.sub(r"```.*?```|saved as `[^`]+`", "", text, flags=re.DOTALL)
    for path, name in re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|sh))`(?:: `([\w.]+)`)?", prose):
        file = next((folder / path for folder in folders if (folder / path).is_file()), None)
        if file is None and path.split("/")[0] in rooms:
            yield path
        elif file is not None and name:
            code = file.read_text("utf-8")
            yield from (name for part in name.split(".") if not re.search(rf"\b(def|class) {part}\b", code))


def test_the_files_and_functions_that_pages_name_are_there():
    assert not [(p.stem, name) for p in PAGES for name in not_there(p.read_text("utf-8"))]
    wrong = "`tests/launchers/test_nothing.py`, `data/stream.py`: `Stream.nothing`, `deepspeed/runtime/config.py`"
    assert list(not_there(wrong)) == ["tests/launchers/test_nothing.py", "Stream.nothing"]


def test_every_link_of_the_readme_leads_to_a_file():
    """The links of docs/ are checked when the site is built."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert len(local) > 20 and not [link for link in local if not (ROOT / link).is_file()]
