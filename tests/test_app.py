"""The page in a browser: a video plays while it is made, and what goes wrong is one line there.

    python -m pytest -m browser         drives a real Chromium; left out of an ordinary run
"""
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from PIL import Image
from test_infer import speech, weights  # noqa: F401 (a fixture)

from data import SAMPLE_RATE

PORTRAIT = ROOT / "assets" / "portrait.jpg"


@pytest.fixture
def stream():
    pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
    import app
    return app.Stream()


def test_a_stream_can_be_played_while_it_is_made(stream):
    """Property: what has been sent at any time is a playable video, with sound in step (a flash and
    a click at 1 s stay together); a reader who comes late gets it from the start."""
    received = []
    reader = threading.Thread(target=lambda: received.extend(stream.read()))
    reader.start()
    stream.open(32, with_sound=True)
    frames, sound = np.zeros((50, 32, 32, 3), np.uint8), np.zeros(2 * SAMPLE_RATE, np.float32)
    frames[25], sound[25 * 640:25 * 640 + 320] = 255, 0.9
    for begin in range(0, 50, 10):
        stream.add(frames[begin:begin + 10], sound[begin * 640:(begin + 10) * 640])
    early = bytes(stream.data)
    stream.close()
    reader.join(5)
    assert b"".join(received) == bytes(stream.data) == b"".join(stream.read())
    assert stream.data.startswith(early) and len(early) < len(stream.data)
    for data, least in ((early, 25), (stream.data, 50)):
        with av.open(io.BytesIO(data)) as file:
            assert least <= sum(1 for _ in file.decode(video=0)) <= 50
    with av.open(io.BytesIO(stream.data)) as file:
        flash = max(file.decode(video=0), key=lambda frame: frame.to_ndarray().mean()).time
    with av.open(io.BytesIO(stream.data)) as file:
        blocks = [(frame.time, frame.to_ndarray()[0]) for frame in file.decode(audio=0)]
    start, loudest = max(blocks, key=lambda block: np.abs(block[1]).max())
    click = start + np.abs(loudest).argmax() / SAMPLE_RATE
    assert abs(click - flash) <= 0.01
    samples = sum(len(block) for _, block in blocks)
    assert abs(samples - len(sound)) <= 3 * 1024                    # AAC comes in blocks


def test_a_microphone_of_any_rate_becomes_16_khz_blocks(stream):
    """Property: blocks of 48 kHz stereo become the same seconds at 16 kHz, without a click between
    them; a switched-off microphone ends the recording."""
    t = np.arange(48000) / 48000
    tone = np.int16(8000 * np.sin(2 * np.pi * 440 * t))
    for begin in range(0, len(tone), 4800):
        block = tone[begin:begin + 4800]
        stream.listen(48000, np.stack([block, block], 1))
    stream.sound.put(None)
    sound = np.concatenate(list(stream.blocks()))
    assert stream.samples == len(sound) and abs(len(sound) - 16000) < 100
    expected = 8000 / 32768 * 2 * np.pi * 440 / 16000               # steepest step of the tone
    assert np.abs(np.diff(sound[200:])).max() < 1.1 * expected


@pytest.fixture
def app(monkeypatch, tmp_path):
    """What the page does, without weights, a page or a server."""
    pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
    import app
    monkeypatch.setattr(app.infer, "load", lambda name: SimpleNamespace(size=32, read=name))
    return app.App(app.Options(share=True, longest=1.0), tmp_path)


def test_a_page_that_is_left_or_ended_keeps_nothing(app, tmp_path):
    """Property: sound of over `longest` seconds, or after the end, is not kept; a page left in the
    queue makes no video, and nobody waits for it; videos of an hour ago are deleted."""
    visitor = SimpleNamespace(session_hash="me")
    app.begin(True, PORTRAIT, "sound", visitor)
    stream = app.streams["me"]
    for _ in range(20):
        app.receive((16000, np.ones(1600, np.int16)), visitor)
    assert 16000 <= stream.samples < 16000 + 1600 == 17600
    assert sum(map(len, stream.blocks())) == stream.samples             # and then it is over
    app.leave(visitor)
    assert list(stream.read()) == []
    old = tmp_path / "talking-1.mp4"
    old.touch()
    os.utime(old, (0, 0))
    assert app.make(PORTRAIT, 0, "sound", None, "", visitor) is None and not old.exists()
    assert list(app.speak(PORTRAIT, 0, None, "", visitor)) == []
    app.streams["me"] = stream
    before = stream.samples
    app.receive((16000, np.ones(1600, np.int16)), visitor)
    assert stream.samples == before


def test_the_crop_is_what_will_be_animated(app, tmp_path):
    """Property: of "the whole picture" the centre square is shown; a bad file is refused; a guest
    does not choose among our folders; no message has a flag or a folder in it."""
    import app as module
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    shown, _ = app.look(str(tmp_path / "wide.png"), 3, "/etc")
    assert shown.shape == (32, 32, 3) and shown.min() > 240
    assert app.models("/etc").read == str(app.options.weights)
    (tmp_path / "bad.png").write_text("text", encoding="utf-8")
    for face in (0, 3):
        with pytest.raises(module.gr.Error, match="^.bad.png is not a picture"):
            app.look(str(tmp_path / "bad.png"), face, "")
    assert module.words_of_the_page("/tmp/x/a.png: no face (try --crop none)") == "a.png: no face"


def test_without_gradio_it_says_what_to_install():
    """Property: the page is an extra; without its package there is one line and exit code 2."""
    code = "import sys; sys.modules['gradio'] = None; import app"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "app.py: there is no Gradio: pip install -r requirements-app.txt\n"

# ------------------------------------------------------------------------------------ in Chromium


@pytest.fixture
def page(weights, tmp_path):  # noqa: F811
    """The page of a running app.py, in Chromium with a made-up microphone."""
    pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
    reason = "pip install playwright==1.65.2, and Debian's chromium"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip(reason)
    command = [sys.executable, ROOT / "app.py", "--weights", weights, "--port", "7871"]
    with open(tmp_path / "log", "w") as log, sync(playwright) as run:
        server = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        try:
            deadline = time.time() + 300
            while "open http" not in (tmp_path / "log").read_text() and time.time() < deadline:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
            chromium = run.chromium.launch(executable_path=browser, args=[
                "--no-sandbox", "--autoplay-policy=no-user-gesture-required"])
            page = chromium.new_page()
            page.set_default_timeout(120_000)
            page.goto("http://127.0.0.1:7871")
            page.get_by_role("button", name="Make the video").wait_for()
            yield page
            chromium.close()
        finally:
            server.terminate()
            server.wait()


def sync(playwright):
    return playwright.sync_playwright()


def upload(page, kind, path):
    page.locator(f"input[type=file][accept*={kind}]").first.set_input_files(path)


def until(page, locator, script):
    """Wait until JavaScript about an element is true -> its value."""
    for _ in range(600):
        if value := locator.evaluate(script):
            return value
        page.wait_for_timeout(100)
    raise AssertionError(f"never: {script}")


@pytest.mark.browser
def test_the_page_in_a_browser(page, tmp_path):
    """Property: a person sees the crop first, must accept the terms, watches the video while it is
    made and then gets the whole; can stop it; a wrong file is one line."""
    make = page.get_by_role("button", name="Make the video")
    upload(page, "image", PORTRAIT)
    page.get_by_text("px from eye to eye").wait_for()
    soundfile.write(tmp_path / "speech.wav", speech(3), SAMPLE_RATE)
    upload(page, "audio", tmp_path / "speech.wav")
    page.get_by_label("Play").first.wait_for()
    make.click()
    page.get_by_text("please accept the terms first").wait_for()
    assert not page.locator("video").count()

    page.get_by_role("checkbox").first.check()
    make.click()
    playing = page.locator("video[src^='/stream/']")
    until(page, playing, "video => video.currentTime > 0")
    finished = page.locator("video[src*='talking-']")
    finished.wait_for()
    assert until(page, finished, "video => video.duration") == pytest.approx(3, abs=0.1)

    page.get_by_label("Clear").last.click()                         # a long one, and Stop
    soundfile.write(tmp_path / "long.wav", np.tile(speech(10), 10), SAMPLE_RATE)
    upload(page, "audio", tmp_path / "long.wav")
    page.get_by_text("1:40").first.wait_for()
    first = finished.get_attribute("src")
    make.click()
    until(page, playing, "video => video.currentTime > 0")
    page.get_by_role("button", name="Stop").click()
    page.locator(f"video[src*='talking-']:not([src='{first}'])").wait_for()
    assert 0 < until(page, finished, "video => video.duration") < 99

    (tmp_path / "bad.wav").write_text("not a recording", encoding="utf-8")
    page.get_by_label("Clear").last.click()
    upload(page, "audio", tmp_path / "bad.wav")
    page.wait_for_timeout(1000)
    make.click()
    page.get_by_text("cannot read").wait_for()
