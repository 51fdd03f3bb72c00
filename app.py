"""infer.py in a browser: a photo and a recording, or a microphone, make a video that plays at once.

    pip install -r requirements-app.txt && python app.py        then open http://127.0.0.1:7860
    python app.py --live                                        speak, and the photo speaks

The page is Gradio's, and only this machine can open it. Uploads are deleted after an hour, videos
of over an hour ago when the next one is made, everything at the end. The video is streamed as a
fragmented MP4, which a <video> element plays while it grows. Live, the video is behind the voice by
the sound of a chunk, see infer.py, and the computing.
"""
import queue
import re
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import tyro

import common
import infer
from audio import load_audio
from data import FPS, HOP, SAMPLE_RATE, to_uint8
from media import read_picture

try:
    import gradio as gr
    from fastapi.responses import StreamingResponse
except ImportError:
    print("app.py: there is no Gradio: pip install -r requirements-app.txt", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).parent
EXAMPLE = [str(ROOT / "assets" / name) for name in ("portrait.jpg", "speech.flac")]
TERMS = """
**Before the first video.** A machine that makes a face speak can impersonate and deceive.
Use faces and voices only with the consent of their owners. Do not imitate real people without
authorization, and do not use this to deceive in politics or trade, to harass, or to harm. Say that
a video is synthetic wherever you show it (AsymTalker, arXiv 2605.02948, Appendix K).
"""
# A browser waits until it can play without a pause. Live it should show the newest second.
CATCH_UP = ("const end = this.buffered.length ? this.buffered.end(0) : 0; "
            "if (end - this.currentTime > 2.5) { this.currentTime = end - 1; this.play(); }")
FACES = ["the largest face", "the second face", "the third face", "the whole picture (a drawing)"]


@dataclass(frozen=True)
class Options:
    weights: Path = ROOT / "weights/tiny"       # folder with config.json; the page can change it
    live: bool = False          # a microphone instead of a recording
    port: int = 7860            # of 127.0.0.1
    share: bool = False         # let others in through Gradio's servers; they will see everything
    longest: float = 120.0      # longest recording, or speech if live, seconds
    largest: str = "50mb"       # largest file to upload


class Stream:
    """A video on its way to a browser, and, live, sound on its way from there."""

    def __init__(self):
        self.data, self.more = bytearray(), threading.Condition()
        self.sound = queue.SimpleQueue()        # blocks of samples; None: it is over
        self.samples = 0                        # put into it so far
        self.frames, self.ended, self.stopped = 0, False, False
        self.container = self.resampler = None

    def open(self, size, with_sound):
        """The first bytes: no index at the end, a fragment every half second."""
        flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        self.container = av.open(self, "w", format="mp4", options=flags)
        options = {"preset": "veryfast", "tune": "zerolatency", "g": str(FPS // 2)}
        self.video = self.container.add_stream("libx264", FPS, options=options)
        self.video.width, self.video.height, self.video.pix_fmt = size, size, "yuv420p"
        self.voice = self.container.add_stream("aac", SAMPLE_RATE, layout="mono") \
            if with_sound else None

    def write(self, data):                      # called by FFmpeg
        with self.more:
            self.data += data
            self.more.notify_all()
        return len(data)

    def add(self, frames, audio=None):
        """uint8 (T, H, W, 3) and their samples"""
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            self.container.mux(self.video.encode(picture))
        if audio is not None and len(audio):
            block = av.AudioFrame.from_ndarray(audio[None], "fltp", "mono")
            block.sample_rate, block.pts = SAMPLE_RATE, self.frames * HOP
            self.container.mux(self.voice.encode(block))
        self.frames += len(frames)

    def close(self):
        if self.container is not None and not self.ended:
            for track in (self.video, self.voice):
                self.container.mux(track.encode(None) if track else [])
            self.container.close()
        with self.more:
            self.ended = True
            self.more.notify_all()

    def read(self):
        """Yields the bytes, from the first one on, as they come."""
        begin = 0
        while True:
            with self.more:
                self.more.wait_for(lambda begin=begin: self.ended or len(self.data) > begin)
                part = bytes(self.data[begin:])
            if not part:
                return
            begin += len(part)
            yield part

    def listen(self, rate, samples):
        """A block of a microphone, int16 (n,) or (n, channels), at any rate."""
        if self.resampler is None:
            self.resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        mono = np.float32(samples).reshape(len(samples), -1).mean(1) / 32768
        frame = av.AudioFrame.from_ndarray(mono[None], "flt", "mono")
        frame.sample_rate = rate
        for part in self.resampler.resample(frame):
            self.samples += part.samples
            self.sound.put(part.to_ndarray()[0])

    def blocks(self):
        """Yields the sound; it is over after None, or when the page is gone for 30 s."""
        while not self.stopped:
            try:
                block = self.sound.get(timeout=30)
            except queue.Empty:
                return
            if block is None:
                return
            yield block


class App:
    """What the page does. One video at a time; a session has one stream."""

    def __init__(self, options, folder):
        self.options, self.folder = options, Path(folder)
        self.streams = {}
        self.load = lru_cache(maxsize=1)(infer.load)
        self.load(str(options.weights))         # a wrong folder ends the program, not a video

    def models(self, weights):
        """Those of the folder that the page names; a guest does not choose among our folders."""
        return self.load(str(self.options.weights) if self.options.share else weights)

    def look(self, photo, face, weights):
        """The crop and what was done, before anything is made."""
        from measure.framing import frame_face
        if photo is None:
            return None, ""
        with errors_in_the_page():
            picture = read_picture(photo)
            size = self.models(weights).size
            if face == 3:
                return to_uint8(common.centre_square(picture, size)[0][:, None])[0], ""
            number = face + 1 if face else None         # not chosen: a second one is said
            portrait, note, warnings = frame_face("the photo", picture, size, number)
        warnings = [f"**Warning:** {words_of_the_page(line)}" for line in warnings]
        return portrait, "  \n".join([note, *warnings])

    def begin(self, agreed, photo, sound, request: gr.Request):
        """A new stream, and the element that plays it."""
        missing = {"accept the terms": agreed, "give a photo": photo,
                   "give a recording": sound or self.options.live}
        if wanting := [words for words, there in missing.items() if not there]:
            raise gr.Error(f"please {', '.join(wanting)} first", print_exception=False)
        key = request.session_hash
        self.stop(request)
        self.streams[key] = Stream()
        live = f'muted onprogress="{CATCH_UP}"' if self.options.live else ""
        return (f'<video src="/stream/{key}?{time.time()}" autoplay controls {live} '
                'style="height: 300px"></video>'), None

    def stop(self, request: gr.Request):
        stream = self.streams.get(request.session_hash)
        if stream:
            stream.stopped = True
            stream.sound.put(None)

    def prepare(self, photo, face, weights):
        models = self.models(weights)
        picture = read_picture(photo)
        crop = "none" if face == 3 else "face"
        return models, infer.load_portrait("the photo", picture, models.size, crop, face + 1)

    def make(self, photo, face, sound, seed, weights, request: gr.Request,
             progress=gr.Progress()):  # noqa: B008 (Gradio looks for it here)
        """A photo and a recording -> an mp4; the stream gets it piece by piece."""
        for old in self.folder.glob("talking-*.mp4"):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
        stream = self.streams.get(request.session_hash)
        if stream is None:                              # the page was left in the queue
            return None
        with errors_in_the_page(stream):
            audio = load_audio(sound)
            if len(audio) > self.options.longest * SAMPLE_RATE:
                raise ValueError(f"{len(audio) / SAMPLE_RATE:.0f} s of sound are too long: at most "
                                 f"{self.options.longest:.0f} s (--longest)")
            models, image = self.prepare(photo, face, weights)
            stream.open(models.size, with_sound=True)
            total = -(-len(audio) // HOP)
            out = self.folder / f"talking-{time.time_ns()}.mp4"
            with common.VideoWriter(out, models.size, audio) as writer:
                for frames in infer.generate(models, image, audio, int(seed or 0)):
                    writer.write(frames)
                    stream.add(frames, audio[stream.frames * HOP:writer.frames * HOP])
                    progress((writer.frames, total), unit="frames")
                    if stream.stopped:
                        break
        return str(out) if out.exists() else None

    def speak(self, photo, face, seed, weights, request: gr.Request):
        """Live: a photo and a microphone -> how far the video is behind, until it is off."""
        stream = self.streams.get(request.session_hash)
        if stream is None:
            return
        with errors_in_the_page(stream):
            models, image = self.prepare(photo, face, weights)
            stream.open(models.size, with_sound=False)
            for frames in infer.generate(models, image, stream.blocks(), int(seed or 0)):
                behind = stream.samples / SAMPLE_RATE - stream.frames / FPS
                stream.add(frames)
                yield f"{stream.frames / FPS:.1f} s of video, {behind:.1f} s behind the voice"

    def receive(self, sound, request: gr.Request):
        """A block of the microphone; none after the end, or after `longest` seconds."""
        stream = self.streams.get(request.session_hash)
        longest = self.options.longest * SAMPLE_RATE
        if stream is None or sound is None or stream.ended or stream.samples >= longest:
            return
        stream.listen(*sound)
        if stream.samples >= longest:
            stream.sound.put(None)

    def leave(self, request: gr.Request):
        self.stop(request)
        stream = self.streams.pop(request.session_hash, None)
        if stream and stream.container is None:         # nobody will begin, or end, it
            stream.close()

    def send(self, key: str):
        """GET /stream/KEY: the bytes of a video, while it is made."""
        stream = self.streams.get(key)
        return StreamingResponse(stream.read() if stream else [], media_type="video/mp4")

    def page(self):
        """-> gr.Blocks: photo and sound on the left, what is made of them on the right."""
        live = self.options.live
        options = {"analytics_enabled": False, "delete_cache": (600, 3600)}
        with gr.Blocks(title="AsymTalker", **options) as page:
            gr.Markdown("# AsymTalker\nA photo and a voice make a video.\n" + TERMS)
            agreed = gr.Checkbox(label="I have the consent of whose face and voice I use, and keep "
                                       "to these terms")
            with gr.Row():
                with gr.Column():
                    photo = gr.Image(label="Photo of a face", type="filepath", height=300,
                                     image_mode=None, sources=["upload", "webcam"], buttons=[])
                    # Gradio would open the file first, and say more than a line if it cannot
                    photo.preprocess = lambda file: file.path if file else None
                    face = gr.Dropdown(FACES, value=FACES[0], type="index", label="Animate")
                    sound = gr.Audio(label="Speak" if live else "Recording", streaming=live,
                                     type="numpy" if live else "filepath",
                                     sources=["microphone"] if live else ["upload", "microphone"])
                    seed = gr.Number(0, label="Seed: same seed, same video", precision=0, minimum=0)
                    weights = gr.Textbox(str(self.options.weights), label="Folder of weights",
                                         visible=not self.options.share)
                    make = gr.Button("Make the video", variant="primary", visible=not live)
                    stop = gr.Button("Stop", visible=not live)
                with gr.Column():
                    crop = gr.Image(label="What is animated", interactive=False, height=200,
                                    buttons=[])
                    note = gr.Markdown()
                    screen = gr.HTML()
                    behind = gr.Markdown()
                    video = gr.Video(label="Finished video", visible=not live, height=300,
                                     buttons=["download"])
            gr.Examples([EXAMPLE[:1] if live else EXAMPLE], [photo] if live else [photo, sound])
            for changed in (photo, face):
                changed.change(self.look, [photo, face, weights], [crop, note])
            begin = self.begin, [agreed, photo, sound], [screen, video]
            if live:
                sound.start_recording(*begin).success(
                    self.speak, [photo, face, seed, weights], behind, concurrency_limit=1)
                sound.stream(self.receive, sound, stream_every=0.2, concurrency_limit=8)
                sound.stop_recording(self.stop)
            else:
                make.click(*begin).success(
                    self.make, [photo, face, sound, seed, weights], video, concurrency_limit=1)
                stop.click(self.stop, queue=False)
            page.unload(self.leave)
        return page


def words_of_the_page(line):
    """A message without the upload's folder, and without flags, which a page has not."""
    line = re.sub(r"\S*/(?=[^/\s]+)", "", line)
    return re.sub(r" \([^()]*--[^()]*\)", "", line)


@contextmanager
def errors_in_the_page(stream=None):
    """Bad input is one line on the page; the stream ends in any case."""
    try:
        yield
    except (OSError, ValueError, av.FFmpegError) as error:
        words = words_of_the_page(str(error))
        raise gr.Error(words, duration=30, print_exception=False) from None
    finally:
        if stream:
            stream.close()


def main(argv=None):
    options = tyro.cli(Options, args=argv, prog="app.py", description=__doc__,
                       config=(tyro.conf.FlagCreatePairsOff,))
    with common.one_line_errors("app.py"), tempfile.TemporaryDirectory() as folder:
        app = App(options, folder)
        page = app.page().queue(max_size=4)
        server, *_ = page.launch(
            server_name="127.0.0.1", server_port=options.port, share=options.share, quiet=True,
            max_file_size=options.largest, show_error=True, allowed_paths=[folder],
            prevent_thread_lock=True)
        server.add_api_route("/stream/{key}", app.send)
        print(f"open http://127.0.0.1:{options.port}", flush=True)
        page.block_thread()


if __name__ == "__main__":
    main()
