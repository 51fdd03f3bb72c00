"""The house rules, checked like code: who imports whom, which words are used, how long things are.

The paper lives on the ground floor (*.py beside the README), everything else in rooms (tiny/,
synthetic/, measure/). Imports go down only, so a reader of one file never has to open a room.
"""
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("tiny", "synthetic", "measure")
BASE = {"media", "data", "common", "vae", "tre", "audio"}
BELOW = BASE | {"dit"}                              # what a program may import

# Who may import whom; a room's name stands for all of its modules. Nothing else is allowed.
ALLOWED = {
    "media": set(),
    "data": {"media"},
    "common": {"media"},
    "vae": {"data"},
    "tre": {"data"},
    "audio": {"media"},
    "dit": {"audio", "tre"},
    "train_teacher": BELOW,
    "distill_student": BELOW | {"infer"},           # it starts from a folder of weights
    "infer": BELOW,
    "convert_weights": BELOW,
    "prepare_data": BELOW | {"measure"},
    "evaluate": BELOW | {"infer", "measure"},
    "app": BELOW | {"infer", "measure"},
    "tiny": BELOW | {"infer", "train_teacher", "distill_student", "tiny", "synthetic", "measure"},
    "synthetic": BELOW | {"synthetic"},
    "measure": BELOW | {"measure", "synthetic.phones"},
}
# Inside a loader function only: what the shipped weights need to run, and the face finder.
LAZY = {("audio", "tiny.whisper"), ("infer", "tiny.model"), ("infer", "measure.framing")}
ONLY_CONSTANTS = ("common", "vae", "tre", "audio")  # of data these import capital letters only

GROUND_FLOOR_FILES = 14
MODULES_OF_A_STAGE = 9
FLAGS = {"train_teacher": ("TeacherConfig", 27), "distill_student": ("StudentConfig", 30)}
LINE = 100
FUNCTION = 70
README_LINES = 250
README_COLUMNS = 110

# ----------------------------------------------------------------------------------------- imports


def modules():
    """{"tiny.model": path, ...}: all modules of the project but the tests."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            name = room if path.stem == "__init__" else f"{room}.{path.stem}"
            found[name] = path
    return found


def imports(path, known):
    """A module's file -> (module imported, names taken from it, inside a function?), local ones."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            taken = [(f"{node.module}.{name}", []) for name in names]
            taken = [one for one in taken if one[0] in known] or [(node.module, names)]
        else:
            continue
        found += [(name, names, id(node) in lazy) for name, names in taken if name in known]
    return found


def allowed(importer, imported):
    """Does the plan of the house have this import?"""
    may = ALLOWED.get(importer, ALLOWED.get(importer.split(".")[0], set()))
    return imported in may or imported.split(".")[0] in may


def forbidden_edges(files):
    """{module: path} -> the imports that the plan does not have, as readable lines."""
    wrong = []
    for importer, path in files.items():
        for imported, names, lazy in imports(path, files):
            by_loader = lazy and (importer, imported) in LAZY
            if not by_loader and not allowed(importer, imported):
                wrong.append(f"{importer} imports {imported}")
            if imported == "data" and importer in ONLY_CONSTANTS:
                wrong += [f"{importer} imports data.{name}" for name in names if not name.isupper()]
    return wrong


def circle(files):
    """{module: path} -> the modules of a circle of imports, [] if there is none."""
    below = {name: {imported for imported, *_ in imports(path, files)
                    if (name, imported) not in LAZY} for name, path in files.items()}
    done, under_way = set(), []

    def visit(name):
        if name in under_way:
            return under_way[under_way.index(name):] + [name]
        under_way.append(name)
        for other in sorted(below[name] - done):
            if found := visit(other):
                return found
        done.add(under_way.pop())
        return []

    return next((found for name in sorted(files) if (found := visit(name))), [])


def test_imports_go_down_only():
    """Property: what a file needs lies below it: no paper file opens a room, nothing goes in a
    circle, and rooms see each other only where the plan says so."""
    files = modules()
    assert {"vae", "dit", "infer"} <= set(files)
    assert not forbidden_edges(files)
    assert not circle(files)


def test_a_forbidden_import_is_found(tmp_path):
    """Property: the check above can fail: an upward import and a circle are both reported."""
    (tmp_path / "dit.py").write_text("def load():\n    import infer\n")
    (tmp_path / "infer.py").write_text("from dit import AudioDiT\nfrom measure import fid\n")
    (tmp_path / "measure.fid.py").write_text("from data import encode_clips\n")
    (tmp_path / "vae.py").write_text("from data import FPS, collate\n")
    (tmp_path / "data.py").write_text("")
    files = {path.stem: path for path in tmp_path.glob("*.py")}
    assert sorted(forbidden_edges(files)) == ["dit imports infer", "infer imports measure.fid",
                                              "vae imports data.collate"]
    assert circle(files) == ["dit", "infer", "dit"]


def test_a_stage_loads_few_modules():
    """Property: reading stage 1 or 2 means reading at most nine files; importing one of them
    loads no renderer and no metric."""
    known = modules()
    for name in ("train_teacher", "distill_student"):
        command = [sys.executable, "-c", f"import sys, {name}; print(*sys.modules)"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = [module for module in run.stdout.split() if module in known]
        assert name in loaded and len(loaded) <= MODULES_OF_A_STAGE, loaded
        assert not [module for module in loaded if module.split(".")[0] in ROOMS]

# ------------------------------------------------------------------------------------------- words

# The first edition had a private language. The field's words stand in the README's tables.
PRIVATE = {
    "audio encoder, audio features": r"ears|hears?|heard|deaf|swap_ears",
    "continuity corruption": r"worn|blotch(es)?",
    "roll-out, video": r"films?",
    "motion guidance": r"liveliness|livelier",
    "eye motion, eyelids": r"lids",
    "guidance_sharpness, face_loss_weight": r"focus|guidance_focus",
    "noise, artefacts": r"fog|dirt|dirty|crumbs?",
    "overfit": r"by heart",
    "tier": r"rungs?",
    "properties": r"(?<!Lambert's )laws?",
    "relative to": r"of the real(?= |,|\.|;|:|$)(?! (video|clip|frame|network|speaker|score|VAE))",
    "encodes, predicts": r"tells",
    "online augmentation": r"(--|cfg\.)fresh|fresh (clips?|chunks?|draws?)",
    "negatives": r"strangers?",
    "overwrite_continuity, teacher_continuity": r"replace_head|(--|cfg\.)(teacher|student)[-_]sees",
    "timestep shift, denoising steps": r"sample_shift",
    "continuity_mode": r"handover",
}
EXCEPTIONS = {"synthetic": {"ears"}}          # a drawn face does have ears
TEXTS = ("*.py", "*.md", "*.txt", "*.toml", ".ci/run")


def private_words(text, exempt=()):
    """Text -> its private words, "word (say: better)". Underscores separate words, too."""
    found = []
    for better, pattern in PRIVATE.items():
        for match in re.finditer(rf"(?<![A-Za-z])({pattern})(?![A-Za-z])", text, re.I):
            if match[1].lower() not in exempt:
                found.append(f"{match[1]} (say: {better})")
    return found


def texts():
    """All files with words in them, but this one, which lists the words that are not used."""
    folders = (ROOT, ROOT / "docs", ROOT / "tests", *(ROOT / room for room in ROOMS))
    paths = [path for folder in folders for pattern in TEXTS for path in folder.glob(pattern)]
    return sorted(path for path in paths if path != Path(__file__).resolve())


def test_words_are_the_fields():
    """Property: a reader meets the field's words only, in code, flags, comments, tests and docs."""
    wrong = {}
    for path in texts():
        exempt = EXCEPTIONS.get(path.parent.name, ())
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := private_words(line, exempt):
                wrong[f"{path.relative_to(ROOT)}:{number}"] = found
    assert not wrong, "\n".join(f"{where}: {', '.join(found)}" for where, found in wrong.items())


def test_a_private_word_is_found():
    """Property: the check above sees words inside names, and leaves ordinary English alone."""
    for text in ("what the ears hear", "worn_kappa", "--guidance-focus", "a film of 12 chunks",
                 "motion, of the real", "fresh clips", "Laws of the VAE", "cfg.sample_shift"):
        assert private_words(text), text
    for text in ("years, appears, hearing aid", "fresh noise", "the laugh of a lawyer", "solid",
                 "the mean of the real video", '"".join(parts).strip()', "filter", "wearing"):
        assert not private_words(text), text

# ------------------------------------------------------------------------------------------ lengths


def sources():
    """Every Python file of the project, tests included."""
    return sorted([*modules().values(), *(ROOT / "tests").glob("*.py")])


def test_lines_and_functions_are_short():
    """Property: a line fits beside the paper and a function on a screen."""
    wrong = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        wrong += [f"{name}:{number} has {len(line)} columns"
                  for number, line in enumerate(text.splitlines(), 1) if len(line) > LINE]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION:
                    wrong.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def flags_of(config):
    """Names of a dataclass's fields that are flags: PresetOnly ones have a mark on their type."""
    hints = get_type_hints(config, include_extras=True)
    return [name for name, hint in hints.items() if not hasattr(hint, "__metadata__")]


def test_the_ground_floor_is_small():
    """Property: a student sees the whole paper at one glance: few files, few flags, one README."""
    assert len(list(ROOT.glob("*.py"))) <= GROUND_FLOOR_FILES
    for module, (config, most) in FLAGS.items():
        module = importlib.import_module(module)
        flags = flags_of(module.Files) + flags_of(getattr(module, config))
        assert len(flags) <= most, flags
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert not [line for line in lines if len(line) > README_COLUMNS]


def test_every_test_says_what_it_shows():
    """Property: the tests can be read as a list of properties: each has a sentence of its own."""
    silent = []
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            if is_test and not ast.get_docstring(node):
                silent.append(f"{path.name}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)
