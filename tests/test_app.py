"""The page in a browser: a video plays while it is made, and what goes wrong is one line there.

    python -m pytest -m browser         drives a real Chromium; left out of an ordinary run
"""
import io
import shutil
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from test_infer import speech, weights  # noqa: F401 (a fixture)

from data import SAMPLE_RATE

PORTRAIT = ROOT / "assets" / "portrait.jpg"


@pytest.fixture
def stream():
    pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")
    import app
    return app.Stream()


def test_a_stream_can_be_played_while_it_is_made(stream):
    """Property: what has been sent at any time is a playable video, with sound in step; a reader
    who comes late gets it from the start; the end is the end."""
    received = []
    reader = threading.Thread(target=lambda: received.extend(stream.read()))
    reader.start()
    stream.open(32, with_sound=True)
    frames = np.random.default_rng(0).integers(0, 255, (50, 32, 32, 3), np.uint8)
    sound = speech(2)
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
        samples = sum(frame.samples for frame in file.decode(audio=0))
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
    upload(page, "audio", ROOT / "assets" / "speech.flac")
    page.get_by_text("0:11").first.wait_for()
    first = finished.get_attribute("src")
    make.click()
    until(page, playing, "video => video.currentTime > 0")
    page.get_by_role("button", name="Stop").click()
    page.locator(f"video[src*='talking-']:not([src='{first}'])").wait_for()
    assert 0 < until(page, finished, "video => video.duration") < 10

    (tmp_path / "bad.wav").write_text("not a recording", encoding="utf-8")
    page.get_by_label("Clear").last.click()
    upload(page, "audio", tmp_path / "bad.wav")
    page.wait_for_timeout(1000)
    make.click()
    page.get_by_text("cannot read").wait_for()
