"""The README is checked like code: what can be counted, read from a file or run is never typed by hand.

    python tests/test_readme.py      writes the blocks between `<!-- generated: NAME -->` and `<!-- end -->` of README.md anew
"""
import ast
import contextlib
import dataclasses
import importlib
import io
import json
import math
import re
import shlex
import statistics
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]                                # as a script there is no conftest.py
README, TINY = ROOT / "README.md", ROOT / "weights" / "tiny"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.S)
FIGURES = ("fid", "fvd", "sync_c", "sync_d", "sync_offset", "identity", "mouth", "mouth_heard", "gap_pbm", "closed_pbm", "mouth_sd",
           "mouth_sd_silence", "proxy_sync_now", "proxy_sync_offset", "proxy_identity", "proxy_frechet", "faces", "blinks", "head", "seam",
           "sharpness", "colour", "fps", "latency")
PAPER = {"fid": "13.72", "fvd": "116.78", "sync_c": "8.11", "sync_d": "7.25", "fps": "66.02"}      # Table 1, HDTF; Figure 6
MADE = ("talking", "weights/mine", "weights/wan", "weights/tiny/evaluation.json", "weights/tiny/evaluation_grid.json",
        "weights/tiny/evaluation_long.json", "weights/tiny/table4.json", "assets/drift.png",
        "weights/tiny/proxies/proxies.json", "report/", "runs/", "assets/sheet.png", "assets/preview.webp", "assets/teacher.png",
        "assets/student.png", "tests/test_exercise.py")                         # what commands make
ALLOWED = ("pip", "cp", "mv", "mkdir", "git", "ruff", "python", "torchrun")     # first words of a command

# ---------------------------------------------------------------------------------------------------------------- blocks


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def header(path):
    """A .safetensors -> its metadata, its number of parameters; the first 8 bytes are the length of a JSON, which lists all tensors."""
    with open(path, "rb") as file:
        tensors = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    metadata = tensors.pop("__metadata__", {})
    return metadata, sum(math.prod(t["shape"]) for t in tensors.values())


def table(head, rows):
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (head, ["---"] * len(head), *rows))


def missing(path, command):
    return f"**Not measured yet:** there is no `{path}`. `{command}` makes it.\n"


def pictures(old):
    out = ""
    for name, text, how in (("preview.webp", "A generated video", "from `infer.py`, the two commands below"),
                            ("sheet.png", "Rows: real, VAE, frozen, teacher, student; columns: seconds", "from `evaluate.py`: `report/sheet.png`")):
        there = (ROOT / "assets" / name).is_file()
        out += f"![{text}](assets/{name})\n\n" if there else f"*No `assets/{name}` yet ({how}).*\n\n"
    return out


def state(old):
    out = []
    for who in ("teacher", "student"):
        meta = header(path)[0] if (path := TINY / f"{who}.safetensors").is_file() else None
        if meta is None:
            out.append(f"There is no {who} yet.")
        elif meta.get("trained") == "no":
            out.append(f"The {who}'s weights are zeros, **not trained yet**: it makes coloured fog of the right length, and `infer.py` says so.")
        elif not json.loads(meta.get("config", "{}")).get("distill", True):
            out.append(f"The {who} is the teacher's own weights in few steps, **not distilled**.")
        else:
            out.append(f"The {who} was trained for {int(meta.get('steps', 0)):,} steps.")
    return " ".join(out) + "\n"


def bars(old):
    """What has to be reached, and is or is not: read off the two reports, so that no figure here is better than its file."""
    found = [read_json(TINY / f"{name}.json") for name in ("evaluation", "evaluation_grid")]
    if not all(report and "teacher-other-sound" in report["systems"] for report in found):
        return missing("weights/tiny/evaluation.json and evaluation_grid.json", "python evaluate.py --weights weights/tiny --data CLIPS --controls")
    systems = [report["systems"] for report in found]
    get = lambda s, who, key: s[who][key]["mean"]
    ratio = lambda s, who, key: get(s, who, key) / get(s, "real", key)
    rows = [("mouth, correlation with the true one, speech only", "0.8; GRID 0.6", "mouth", "", get, lambda x, i: x >= (0.8, 0.6)[i]),
            ("... with another clip's sound", "at most 0.15", "mouth", "-other-sound", get, lambda x, i: x <= 0.15),
            ("motion of the lips, of the real, to a silent recording", "still: 0.15", "mouth_sd", "-silence", ratio, lambda x, i: x <= 0.15),
            ("share of p, b, m with lips shut, of the real", "close: 0.8", "closed_pbm", "", ratio, lambda x, i: x >= 0.8),
            ("motion of the head, of the real", "0.5 to 2", "head", "", ratio, lambda x, i: 0.5 <= x <= 2),
            ("blinks, of the real", "0.5 to 2", "blinks", "", ratio, lambda x, i: 0.5 <= x <= 2)]
    cell = lambda x, met: f"{x:.3f}" + ("" if met else " (missed)")
    out = []
    for label, bar, key, control, value, met in rows:
        line = [label, bar]
        for i, s in enumerate(systems):
            line += ["-" if control else f"{value(s, 'vae', key):.3f}"]
            line += [cell(x := value(s, who + control, key), met(x, i)) for who in ("teacher", "student")]
        out.append(line)
    return table(["20 held-out clips each", "asked for", "new faces: VAE", "teacher", "student", "GRID: VAE", "teacher", "student"], out)


def first(old):
    import soundfile
    sound = soundfile.info(ROOT / "assets" / "speech.flac")
    frames = -(-sound.frames * 25 // sound.samplerate)
    return f"```\nvideo: talking.mp4\nframes: {frames}\nseconds: {frames / 25:.2f}\nframes_per_second: (your machine's)\n```\n"


def results(old):
    import report
    tables = []
    for path in sorted(TINY.glob("evaluation*.json"), key=lambda p: (len(p.name), p.name)):         # puppets first
        found = read_json(path)
        for window in (found["systems"], *found["drift"].values()):             # the chief figures; all are in the file
            for name in window:
                window[name] = {k: v for k, v in window[name].items() if k in FIGURES}
        first, mark, drift = report.markdown(found).partition("\nDrift: ")
        extra = {f"| {label} |": f" {PAPER.get(key, '-')} |" for key, (_, label) in report.METRICS.items()}
        extra |= {"| metric |": " paper, HDTF |", "|---|---|": "---|"}          # one more column: the paper's figure
        first = "".join(line + next((more for start, more in extra.items() if line.startswith(start)), "") + "\n" for line in first.split("\n"))
        tables.append(first.rstrip("\n") + "\n" + mark + drift)
    return "\n".join(tables) or missing("weights/tiny/evaluation.json", "python evaluate.py --weights weights/tiny --data CLIPS --long 600")


def memory(old):
    """The last rung's memory: 20 bytes a parameter in stage 1, 40 in stage 2, and what a chunk of 21 latents at 512 x 512 leaves behind."""
    import torch

    import dit
    rows, tokens, inner = [], 21 * 32 * 32, 3.0
    for name in ("wan-1.3b", "wan-14b"):
        with torch.device("meta"):
            count = sum(p.numel() for p in dit.AudioDiT(dit.PRESETS[name]).parameters())
        config = dit.PRESETS[name]
        for stage, size in ((1, 20), (2, 40)):
            inputs = tokens * config.dim * 4 * config.layers / 2 ** 30          # float32, one a block: --checkpointing
            inside = inner * config.dim / 1536
            cells = [f"{count * size / 2 ** 30 / n + inputs + inside:.1f}" for n in (1, 8, 16)]
            rows.append([f"`{name}`", f"{count / 1e9:.3f} B", stage, f"{count * size / 2 ** 30:.1f}", f"{inputs:.1f}", *cells])
    return table(["network", "parameters", "stage", "state, all GPUs", "block inputs, each GPU", "1 GPU", "each of 8", "each of 16"], rows)


def lines(old):
    """The last column of the table: the lines of the files in the first."""
    def count(match):
        total = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in re.findall("`(.*?)`", match[1]))
        return f"| {match[1]} | {match[2]} | {total} |"
    return re.sub(r"^\| (`.*?) \| (.*) \| .*? \|$", count, old, flags=re.M)


def equations(old):
    """Number -> the functions that say "Eq. NUMBER" in their docstrings or comments, in the order of the paper."""
    where = {}
    for script in ("dit", "tre", "train_teacher", "distill_student", "chunks", "audio", "linear", "data"):
        source = (path := ROOT / f"{script}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            name = getattr(node, "name", "Config")
            if not name.endswith("Config") and name not in ("build_parser", "plot", "validate"):
                for text in re.findall(r"Eq\. (\d+(?:(?:-|, | and )\d+)*)", ast.get_source_segment(source, node)):
                    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
                        for number in range(int(first), int(last or first) + 1):
                            where.setdefault(number, {}).setdefault(path.name, {})[f"`{name}`"] = 1
    cells = {number: "; ".join(f"`{file}` {', '.join(names)}" for file, names in files.items()) for number, files in where.items()}
    return table(["Eq.", "where"], sorted(cells.items()))


def settings(old):
    from distill_student import PRESETS as student
    from train_teacher import PRESETS as teacher
    rows = []
    for stage, presets, name in ((1, teacher, "train_teacher.py"), (2, student, "distill_student.py")):
        meaning = dict(re.findall(r"^    (\w+): .*?# (.*)", (ROOT / name).read_text(encoding="utf-8"), re.M))
        for field in dataclasses.fields(presets["tiny"]):
            if "paper" in (text := meaning[field.name]):
                values = (value if isinstance(value := getattr(presets[name], field.name), str) else f"{value:g}" for name in ("tiny", "wan-1.3b"))
                rows.append([stage, f"`--{field.name.replace('_', '-')}`", *values, text])
    return table(["stage", "flag", "tiny", "wan-1.3b", "meaning, and what the paper says"], rows)


def weights(old):
    rows = []
    for name, code in (("vae", "train_vae.py"), ("whisper/model", "train_audio.py"), ("teacher", "train_teacher.py"),
                       ("student", "distill_student.py"), ("proxies/sync", "train_proxies.py"), ("proxies/identity", "train_proxies.py"),
                       ("proxies/face", "train_proxies.py")):
        path, code = TINY / f"{name}.safetensors", f"`{code}`"
        if not path.is_file():
            rows.append([f"{name}.safetensors", "-", "-", "not here yet", code])
            continue
        meta, count = header(path)
        how = ", ".join(f"{k} {v}" for k, v in meta.items() if k not in ("class", "trained", "format", "config", "proxy"))
        trained = "no: zeros" if meta.get("trained") == "no" else how
        rows.append([f"{name}.safetensors", f"{count / 1e6:.1f} M", f"{path.stat().st_size / 1e6:.1f}", trained or "yes", code])
    return table(["file", "numbers", "MB", "trained", "by"], rows)


def vae(old):
    found = read_json(TINY / "vae_metrics.json")
    parts = {k: v for k, v in found.items() if isinstance(v, dict) and "psnr" in v}
    keys = {"clips": "held-out clips", "psnr": "PSNR, dB", "ssim": "SSIM", "psnr_mouth": "PSNR of the mouth, dB",
            "psnr_single_frame": "PSNR of single frames, dB", "flicker": "flicker, grey levels", "flicker_frame_by_frame": "... each frame by itself",
            "psnr_round_1": "PSNR after 1 decode and encode", "psnr_round_10": "... after 10", "psnr_round_30": "... after 30"}
    cell = lambda value: f"{value:#.4g}" if isinstance(value, float) else value
    rows = [[label, *(cell(part.get(key, "-")) for part in parts.values())] for key, label in keys.items()]
    seconds = ", ".join(f"{v} s in {k}" for k, v in found["decode_81_frames_seconds"].items())
    return table(["small VAE", *(f"`{name}`" for name in parts)], rows) + f"\nDecoding 81 frames, {found['threads']} threads: {seconds}.\n"


def audio(old):
    found = read_json(TINY / "whisper" / "metrics.json")
    keys = {"phone_accuracy": "phone of a frame", "phone_accuracy_without_silence": "... without silence",
            "viseme_accuracy": "mouth shape of a frame", "viseme_accuracy_without_silence": "... without silence",
            "opening_correlation": "how far the lips are open, correlation"}
    cell = lambda key: "-" if key not in found else f"{found[key]:.3f}" if key.endswith("correlation") else f"{100 * found[key]:.1f} %"
    return table([f"small Whisper: {found['speakers']} unseen speakers, {found['frames']:,} frames", "right",
                  f"GRID's unseen clips, {found.get('clips_frames', 0):,} frames"],
                 [[label, cell(key), cell(f"clips_{key}")] for key, label in keys.items()])


def proxies(old):
    found = read_json(TINY / "proxies" / "proxies.json")
    if not found:
        return missing("weights/tiny/proxies/proxies.json", "python evaluate.py train-proxies --data CLIPS CLIPS")
    rows = []
    for folder, scale in found["scale"].items():
        sync, who, face = (scale.get(k, {}) for k in ("sync", "identity", "face"))
        figures = [(f"sync: real above {case}", row["auc_real_above"], 0.5) for case, row in sync.items() if case != "real"]
        figures += [("identity: same person above another", who.get("auc_same_above_other"), 0.5)]
        figures += [(f"face: lip gap against {face.get('against')}, correlation{how}", face.get(key), 0)
                    for key, how in (("mouth_correlation", ""), ("mouth_correlation_vae", ", seen through the VAE"))]
        rows += [[f"`{folder}`", *figure] for figure in figures if figure[1] is not None]
    return table(["held-out clips", "proxy", "figure (1 = always right)", "blind"], rows)


def curves(old):
    out = ""
    for stage, name in ((1, "teacher"), (2, "student")):
        there = (ROOT / "assets" / f"{name}.png").is_file()
        out += (f"![Stage {stage}, the shipped run](assets/{name}.png)\n" if there else
                f"Stage {stage}: no reference curve yet (`assets/{name}.png`, from `--plot` of the run whose weights are shipped).\n") + "\n"
    return out


def laws(old):
    rows = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        count = sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
        rows.append([f"`tests/{path.name}`", count, (ast.get_docstring(tree) or "").split("\n")[0]])
    return table(["file", "tests", "what they are about"], rows)


def table4(old):
    """weights/tiny/table4.json, {row: [last `val` of log.jsonl, one a seed]} -> mean and standard deviation over the seeds."""
    found = read_json(TINY / "table4.json")
    if not found:
        return missing("weights/tiny/table4.json", "the command below")
    rows = []
    for row, vals in found["rows"].items():
        figures = [[v["error"][0] for v in vals], [v["error"][-1] for v in vals], [v["colour"][0] for v in vals], [v["colour"][-1] for v in vals],
                   [v["seam"] for v in vals]]
        spread = [f" ± {statistics.stdev(f):.3f}" if len(f) > 1 else "" for f in figures]
        rows.append([row, len(vals), *(f"{statistics.mean(f):.3f}{s}" for f, s in zip(figures, spread))])
    last = len(next(iter(found["rows"].values()))[0]["error"])
    heads = [f"{what}, chunk {which}" for what in ("error", "colour") for which in (1, last)]
    return table(["teacher / student see", "seeds", *heads, "seam"], rows)


BLOCKS = {f.__name__: f for f in (pictures, state, bars, first, results, memory, lines, equations, settings, weights, vae, audio, proxies, table4,
                                  curves, laws)}


def rewrite(text):
    return BLOCK.sub(lambda m: m[1] + BLOCKS[m[2]](m[3]) + m[4], text)


# ----------------------------------------------------------------------------------------------------------------- tests

TEXT = README.read_text(encoding="utf-8")
CODE = {kind: re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.M | re.S) for kind in ("bash", "python")}
EXERCISES = [block for block in CODE["python"] if block.startswith("# exercise")]


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


HELP = {}


def help_of(script, *command):
    """What `python SCRIPT --help` prints, without a new process."""
    if (script, *command) not in HELP:
        module, said = importlib.import_module({"vae.py": "train_vae"}.get(script, Path(script).stem)), io.StringIO()
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "250")                                      # nothing is broken over two lines
            patch.setenv("NO_COLOR", "1")
            patch.setattr(sys, "argv", [script])
            module.main([*command, "--help"])
        assert stop.value.code == 0
        HELP[script, *command] = said.getvalue()
    return HELP[script, *command]


def complaints(command):
    """A line of a shell -> what is wrong with it, by the scripts' own --help; nothing is run."""
    words = shlex.split(command, comments=True)
    if words and words[0] == "torchrun":
        words = ["python", *[w for w in words[1:] if not w.startswith("--nproc")]]
    if not words or words[0] != "python" or words[1] in ("-m", "-c"):
        files = [w for w in words if w.endswith((".py", ".txt"))]
        return [w for w in files if not (ROOT / w).exists()] + [w for w in words[:1] if w not in ALLOWED]
    script, words = words[1], words[2:]
    if not (ROOT / script).is_file():
        return [f"no {script}"]
    if script.startswith("tests/"):
        return []
    text = help_of(script, *[w for w in words[:1] if w in ("train-proxies", "cache", "prepare")])
    wrong, names = [], [w.split("=")[0] for w in words if w.startswith("--")]
    for name in names:
        known = re.search(rf"(?<![\w-]){name}(?![\w-])(?: \{{([\w.,-]+)\}})?", text)
        value = words[words.index(name) + 1] if name in words[:-1] else ""
        if not known or known[1] and value not in known[1].split(","):
            wrong.append(f"{script} does not know {name} {value if known else ''}")
    return wrong


def test_the_generated_blocks_are_of_today():
    """Line counts and figures copied by hand are wrong after a week; copied by a program they are wrong only until this fails."""
    found = [name for _, name, _, _ in BLOCK.findall(TEXT)]
    assert sorted(found) == sorted(BLOCKS), "every block once"
    for (_, name, now, _), (*_, then, _) in zip(BLOCK.findall(TEXT), BLOCK.findall(rewrite(TEXT))):
        assert now == then, f"the block `{name}` of README.md has drifted: python tests/test_readme.py"


def test_the_two_commands_are_two():
    """A stranger's first hour begins with two lines; .ci/run takes them from here and runs them in an empty environment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", section("Two commands"), re.M | re.S)
    assert len(blocks) == 1 and [line.split()[0] for line in blocks[0].splitlines()] == ["pip", "python"]


def test_every_command_is_understood():
    """A README's command names a script that exists and flags and choices its --help knows; so do those of every script's own docstring."""
    commands = [line for block in CODE["bash"] for line in block.splitlines()] + re.findall(r"`((?:python|torchrun) .*?)`", TEXT)
    for path in ROOT.glob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        said = [line.strip().replace("...", "") for line in said.splitlines() if re.match(r" +(python|torchrun) ", line)]
        commands += [re.split(r" {2,}|[;|]| -> ", line)[0] for line in said]    # an explanation follows after two blanks
    wrong = {command: bad for command in commands if (bad := complaints(command))}
    assert len(commands) > 30 and not wrong, wrong
    assert complaints("python infer.py --imgae me.jpg") and complaints("python infer.py --network critic") and complaints("python gone.py")


def test_every_file_and_link_is_there():
    """A name in code letters that looks like a file is one, a link leads somewhere, and no script is left out of the reading order."""
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|md|txt|json|safetensors|flac|jpg|png|webp|toml)|/))`", re.sub(r"```.*?```", "", TEXT, flags=re.S)):
        assert (ROOT / name).exists() or (TINY / name).exists() or name.startswith(MADE), f"README.md names {name}"
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", TEXT + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link.split("#")[0]).exists(), f"a link to {link} leads nowhere"
    order = section("Read in this order")
    assert not [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in order]


def test_figures_of_failures_are_the_logs():
    """What is told from LOG.md is told with its own figures: a number that is nowhere in it was rounded or remembered wrongly."""
    log = (ROOT / "LOG.md").read_text(encoding="utf-8")
    told = section("What did not work") + "".join(line for line in TEXT.splitlines(True) if "(LOG.md)" in line)
    for number in re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`.*?`", "", told)):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|[.,]\d)", log), f"{number} is not in LOG.md"


def test_library_example_names_what_exists():
    """The lines of Python can be typed: they parse, and every name taken from a script is there."""
    for block in CODE["python"]:
        tree = ast.parse(block)
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        ours = [name for name in names if (ROOT / f"{name}.py").is_file()]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ours:
                assert hasattr(importlib.import_module(node.value.id), node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("block", EXERCISES, ids=[block.split(":")[0][2:] for block in EXERCISES])
def test_exercises_are_unsolved(block, tmp_path):
    """An exercise with a failing test must fail, and for its own reason: whoever solves it here should take it out of the README."""
    space = {}
    exec(compile(block, "<README.md>", "exec"), space)
    law = next(value for name, value in space.items() if name.startswith("test_"))
    with pytest.raises((AssertionError, TypeError)):
        law(tmp_path) if law.__code__.co_argcount else law()


if __name__ == "__main__":
    new = rewrite(TEXT)
    README.with_suffix(".part").write_text(new, encoding="utf-8")
    README.with_suffix(".part").replace(README)
    print(f"blocks: {len(BLOCKS)}\nchanged: {sum(a != b for a, b in zip(BLOCK.findall(TEXT), BLOCK.findall(new)))}")
