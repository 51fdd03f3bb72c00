"""The README and docs/ are checked like code: what can be counted, read from a file or run is not
typed by hand.

    python tests/test_readme.py         write the generated blocks again

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                       # a script has no conftest.py
TINY = ROOT / "weights" / "tiny"
README = ROOT / "README.md"
DOCS = [README, ROOT / "CONTRIBUTING.md", ROOT / "tiny" / "README.md",
        *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)


def read(path):
    return path.read_text(encoding="utf-8")


def table(head, rows):
    """Column names and rows of cells -> a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

# ---------------------------------------------------------------------------------- reading order


def order(old):
    """The reading order as it stands, with today's line counts in the last column."""
    def count(match):
        return f"| `{match[1]}` | {match[2]} | {len(read(ROOT / match[1]).splitlines())} |"

    return re.sub(r"^\| `(.*?)` \| (.*) \| .*? \|$", count, old, flags=re.M)


def reading_order():
    """The files of the README's reading order, as paths."""
    block = next(match for match in BLOCK.finditer(read(README)) if match[2] == "order")
    return [ROOT / name for name in re.findall(r"^\| `(.*?)`", block[3], re.M)]

# -------------------------------------------------------------------------------------- equations

EQUATIONS = {
    1: "flow matching: noisy point, target",
    2: "the same under audio and identity",
    3: "TRE, the identity reference",
    4: "fusion: noisy latents and z_id on channels",
    5: "the teacher's objective",
    6: "AKD: a KL divergence under two contexts",
    7: "regression anchor, Huber",
    8: "the student's objective",
    9: "the student's chunk",
    10: "Eq. 6 as an expectation (its gradient)",
    11: "the student's chunk with noise",
    12: "velocity to score",
    13: "the gradient of Eq. 10",
    14: "the chunk with noise, detached",
    15: "the critic's loss",
    16: "temporal gradient consistency",
    17: "facial region",
    18: "pool of raw videos",
    19: "duplicates",
    20: "25 fps, one scene, centred on a face",
    21: "share of frames with a face",
    22: "filters",
    23: "audio tokens, face mask",
    24: "a training sample",
    29: "encode-then-repeat, Table 3's baseline",
}
GRADIENT_ONLY = {10: 13}


def numbers_in(text):
    """"Eq. 7-9, 13" -> {7, 8, 9, 13}."""
    found = set()
    for listed in re.findall(r"(?:Eq\.|Equations) (\d+(?:(?:-| to |, | and )\d+)*)", text):
        for first, last in re.findall(r"(\d+)(?:(?:-| to )(\d+))?", listed):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def functions(path):
    """A file -> (qualified name, node) of its functions, classes and methods."""
    for node in ast.parse(read(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def places():
    """{equation number: [(rank, file, name, line), ...]}, the most telling place first.

    rank 0: a docstring that begins with the equation; 1: a comment inside a function, such as
    `# PAPER Eq. 13`, linked by its own line; 2: a docstring that mentions it."""
    found = {number: [] for number in EQUATIONS}
    for position, path in enumerate(reading_order()):
        lines = read(path).splitlines()
        for name, node in functions(path):
            if name.endswith("Config"):
                continue
            text = ast.get_docstring(node) or ""
            mentioned = numbers_in(text)
            title = numbers_in(re.split(r"[:,.] ", text.replace("Eq. ", "Eq.\0"))[0]
                               .replace("\0", " "))
            for number in mentioned & found.keys():
                rank = (0, len(title)) if number in title else (2, 0)
                found[number].append(((*rank, position, node.lineno), path.name, name, node.lineno))
            if isinstance(node, ast.ClassDef):
                continue
            body = node.body[1] if text and len(node.body) > 1 else node.body[0]
            for line in range(body.lineno - 1, node.end_lineno + 1):
                comment = lines[line - 1].partition("# ")[2]
                for number in numbers_in(comment) & found.keys():
                    found[number].append(((1, 0, position, line), path.name, name, line))
    return {number: sorted(where) for number, where in found.items()}


def equations(old):
    """Number -> the functions that name it, at most three, with links to their lines."""
    where = places()
    rows = []
    for number, what in EQUATIONS.items():
        best = where[number] or where[GRADIENT_ONLY.get(number, number)]
        telling = [place for place in best if place[0][0] == 0] or best[:1]
        cell = ""
        for _, file, name, line in telling[:3]:
            link = f"[{file[:-3]}.{name}]({file}#L{line})"
            if not cell or len(what) + len(cell) + len(link) < 95:
                cell += f", {link}" if cell else link
        rows.append([number, what, cell or "nowhere"])
    return table(["Eq.", "what", "where"], rows)

# ---------------------------------------------------------------------------------------- results

ROWS = {"real": "real video", "VAE only": "VAE alone", "frozen": "frozen first frame",
        "teacher": "teacher", "student": "student", "other people": "another person",
        "other audio": "another clip's audio"}
COLUMNS = {"sface": ("identity distance", 2), "lips": ("lip correlation", 2),
           "closed_pbm": ("lips shut at p, b, m", 2), "head_turn": ("head rotation, degrees", 1)}


def reports():
    """The reports of evaluate.py that lie beside the shipped weights, as {name: dict}.

    Those without a scale are of the first edition, whose rulers were trained here: left out."""
    found = {path.name: json.loads(read(path)) for path in sorted(TINY.glob("evaluation*.json"))}
    return {name: report for name, report in found.items() if "scale" in report}


def results(old):
    """The README's one table: six systems, four rulers. Until there is a report: as it is."""
    report = reports().get("evaluation.json")
    if report is None:
        return old
    rows = []
    for system, label in ROWS.items():
        figures = report["systems"].get(system, report["scale"].get(system, {}))
        if not figures:
            continue
        cells = [f"{figures[key]['mean']:.{digits}f}" if key in figures else "-"
                 for key, (_, digits) in COLUMNS.items()]
        rows.append([label, *cells])
    head = ["mean of the videos", *(label for label, _ in COLUMNS.values())]
    short = re.split(" --clips| --device", report["command"])[0]        # the rest: RESULTS.md
    made = f"`{short} ...`,\ncommit {report['commit']}, seed {report['seed']}.\n"
    return table(head, rows) + "\n" + made


def tables(old):
    """docs/RESULTS.md: all tables of all reports. Until there is a report: as it is."""
    from measure.report import markdown
    return "\n".join(f"## {name}\n\n{markdown(one)}" for name, one in reports().items()) or old


BLOCKS = {"results": results, "order": order, "equations": equations, "tables": tables}


def rewrite(text):
    """A document with all of its generated blocks made again."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]](match[3]) + match[4], text)


def test_generated_blocks_are_fresh():
    """Property: line counts, links to equations and figures are those of today's files."""
    names = [name for path in DOCS for _, name, _, _ in BLOCK.findall(read(path))]
    assert sorted(names) == sorted(BLOCKS), "every block once"
    for path in DOCS:
        assert read(path) == rewrite(read(path)), f"{path.name}: run python tests/test_readme.py"


def test_every_equation_is_one_click_away():
    """Property: each of Eq. 1 to 24 and 29 leads from the README to a line of code."""
    where = places()
    for number in [*range(1, 25), 29]:
        assert where[number] or number in GRADIENT_ONLY, f"no docstring names Eq. {number}"
    links = re.findall(r"\]\((\w+\.py)#L(\d+)\)", equations(""))
    assert len(links) >= 25
    for file, line in links:
        assert int(line) <= len(read(ROOT / file).splitlines())


def test_every_ground_floor_file_is_in_the_reading_order():
    """Property: the reading order leaves out no file beside the README."""
    assert sorted(reading_order()) == sorted(ROOT.glob("*.py"))

# --------------------------------------------------------------------------------------- commands

CODE = {(path, kind): re.findall(rf"^```{kind}\n(.*?)^```", read(path), re.M | re.S)
        for path in DOCS for kind in ("bash", "python")}
NOT_OURS = ("pip", "cd", "cp", "git", "hf", "ruff")                 # first words of other commands
HELP = {}


def section(path, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", read(path), re.M | re.S)[1]


def program_of(words):
    """["python", "-m", "tiny.teacher", ...] -> module name, its arguments; None: not a program."""
    if words[0] == "torchrun":
        words = ["python", *(word for word in words[1:] if not word.startswith("--nproc"))]
    if words[0] != "python" or words[1] in ("-c",) or words[1:3] == ["-m", "pytest"]:
        return None, []
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


def help_of(module):
    """What `python MODULE.py --help` prints, without a new process."""
    if module not in HELP:
        page = io.StringIO()
        with contextlib.redirect_stdout(page), pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "300")                          # nothing is broken over lines
            patch.setenv("NO_COLOR", "1")
            patch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit) as stop:
                importlib.import_module(module).main()
        assert stop.value.code == 0
        HELP[module] = page.getvalue()
    return HELP[module]


def complaints(command):
    """One command -> what is wrong with it, by the program's own --help; nothing is run."""
    words = shlex.split(command, comments=True)
    module, arguments = program_of(words) if words else (None, [])
    if module is None:
        files = [word for word in words if word.endswith((".py", ".txt"))]
        missing = [word for word in files if not (ROOT / word).is_file()]
        known = not words or words[0] in (*NOT_OURS, "python", "torchrun")
        return missing + ([] if known else words[:1])
    if module.startswith("tests."):
        return []
    if not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return [f"no program {module}"]
    if module == "app" and find_spec("gradio") is None:
        return []                                                   # it has no --help without
    wrong = []
    for i, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if not name.startswith("--"):
            continue
        following = arguments[i + 1:i + 2]
        value = value or (following[0] if following else "")
        choices = r"(?: (?:None\|)?\{([\w.,|-]+)\})?"
        flag = re.search(rf"(?<![\w-]){name}(?![\w-]){choices}", help_of(module))
        if not flag:
            wrong.append(f"{module} has no {name}")
        elif flag[1] and flag[1] != "None" and value not in re.split(r"[,|]", flag[1]):
            wrong.append(f"{module} {name} cannot be {value}")
    return wrong


def commands_of(path):
    """All commands of a document: lines of its bash blocks, and programs in code letters."""
    blocks = [line for block in CODE[path, "bash"] for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.M | re.S)
    inline = re.findall(r"`((?:python|torchrun) [^`]*?)`", text)
    return [part.strip() for line in blocks + inline for part in line.split("&&")]


def commands_of_docstring(path):
    """The commands in a program's own docstring; an explanation follows after two blanks."""
    text = ast.get_docstring(ast.parse(read(path))) or ""
    text = text.replace("\\\n", " ").replace("\\\\\n", " ").replace("...", "")
    lines = [re.sub(r"\s*\\\s+", " ", line.strip()) for line in text.splitlines()]
    found = [line for line in lines if re.match(r"(python|torchrun) ", line)]
    return [re.split(r" {2,}|[;|]| -> |\[", line)[0] for line in found]


def test_the_two_commands_are_two():
    """Property: after the clone, one command makes the demo video and one passes the tests; each
    installs what it needs. .ci/run takes them from here."""
    blocks = re.findall(r"^```bash\n(.*?)^```", section(README, "Quick start"), re.M | re.S)
    clone, demo, tests = (block.splitlines() for block in blocks)
    assert clone[0].startswith("git clone --depth 1 ") and len(demo) == len(tests) == 1
    assert re.match(r"pip install -r requirements.txt && python infer.py --image \S+ --audio \S+$",
                    demo[0])
    assert tests[0] == "pip install -r requirements-dev.txt && python -m pytest -q -n 2"
    assert "-r requirements.txt\n" in read(ROOT / "requirements-dev.txt")


def test_every_command_is_understood():
    """Property: each command of the documents and docstrings names a program that exists, and
    flags and choices that its --help knows."""
    commands = [command for path in DOCS for command in commands_of(path)]
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tiny/*.py"), *ROOT.glob("synthetic/*.py"),
                *ROOT.glob("measure/*.py")]
    for path in programs:
        commands += commands_of_docstring(path)
    wrong = {command: bad for command in commands if (bad := complaints(command))}
    assert len(commands) > 30 and not wrong, wrong


def test_a_wrong_command_is_found():
    """Property: the check above can fail: a wrong flag, choice, program or file is reported."""
    assert not complaints("python infer.py --image me.jpg --audio speech.wav --network teacher")
    for wrong in ("python infer.py --imgae me.jpg", "python infer.py --network critic",
                  "python gone.py", "python -m tiny.gone", "pip install -r gone.txt", "make all"):
        assert complaints(wrong), wrong

# ------------------------------------------------------------------------------- files and blocks

# What commands make, or what a reader brings along.
MADE = ("runs/", "talking", "split.json", "weights/wan", "weights/mine", "weights/flashhead",
        "report/",
        "report.", "cache", "log.jsonl", "samples.png", "checkpoint.safetensors", "drift.png",
        "sheet.jpg", "clips", "tests/test_exercise.py", "wan.safetensors", "Wan2.1_VAE.pth",
        "docs/tips.md", "diffusion_pytorch_model.safetensors", "distill_mine.py",
        "student.safetensors")
NAME = r"`([\w./-]+(?:\.(?:py|md|txt|json|jsonl|safetensors|flac|jpg|png|svg|webp|toml)|/))`"


def anchors(path):
    """The headings of a document as GitHub's link targets."""
    titles = re.findall(r"^#+ (.*)$", read(path), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_file_and_link_exists():
    """Property: what looks like a file name is a file, and every link leads somewhere."""
    for path in DOCS:
        text = re.sub(r"```.*?```", "", read(path), flags=re.S)
        for name in re.findall(NAME, text):
            here = [(folder / name).exists() for folder in (path.parent, ROOT, TINY)]
            assert any(here) or name.startswith(MADE), f"{path.name} names {name}"
        for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), f"{path.name}: a link to {link} leads nowhere"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target), f"{path.name}: no heading for {link}"


def test_tricks_are_where_the_table_says():
    """Property: each `file.name` of tiny/README.md is a function or class that exists."""
    names = re.findall(r"`(\w+)\.([A-Za-z]\w+)`", read(ROOT / "tiny" / "README.md"))
    names = [(file, name) for file, name in names if name not in ("py", "json")]
    assert len(names) > 10
    for file, name in names:
        module = f"tiny.{file}" if (ROOT / "tiny" / f"{file}.py").is_file() else file
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_python_blocks_name_what_exists():
    """Property: the Python of the documents parses, and every name taken from a file is there."""
    blocks = [block for (_, kind), found in CODE.items() if kind == "python" for block in found]
    assert len(blocks) >= 3
    for block in blocks:
        tree = ast.parse(block)
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names]
        ours = [name for name in names if (ROOT / f"{name}.py").is_file()]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ours:
                module = importlib.import_module(node.value.id)
                assert hasattr(module, node.attr), f"{node.value.id}.{node.attr}"


def test_the_library_example_runs(monkeypatch, capsys):
    """Property: the README's Python lines make frames of the size of the shipped weights."""
    monkeypatch.chdir(ROOT)
    block, = CODE[README, "python"]
    exec(compile(block, "README.md", "exec"), {})
    size = json.loads(read(TINY / "config.json"))["size"]
    assert f", {size}, {size}, 3)" in capsys.readouterr().out


EXERCISES = [block for block in CODE[ROOT / "docs" / "EXERCISES.md", "python"]
             if block.startswith("# exercise")]


@pytest.mark.parametrize("block", EXERCISES, ids=[block[2:12] for block in EXERCISES])
def test_exercises_are_unsolved(block, tmp_path):
    """Property: an exercise's test fails for its own reason; a solved one should leave the list."""
    space = {}
    exec(compile(block, "EXERCISES.md", "exec"), space)
    exercise = next(value for name, value in space.items() if name.startswith("test_"))
    with pytest.raises((AssertionError, TypeError), match="'fit'|first order"):
        exercise(tmp_path) if exercise.__code__.co_argcount else exercise()


if __name__ == "__main__":
    changed = 0
    for document in DOCS:
        before = read(document)
        after = rewrite(before)
        if after != before:
            document.write_text(after, encoding="utf-8")
            changed += 1
    print(f"documents changed: {changed}")
