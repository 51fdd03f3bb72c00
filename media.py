"""Reads any picture, recording or video. Nothing of the paper is in this file; skip it at first.

pictures     upright, in sRGB, on white
videos       25 frames a second, as players show them: turned, mirrored, deinterlaced
sound        to its end, whatever the header claims; of a video, on the clock of its pictures

infer.py and data.py read by the same functions, so a network is shown at the end what it was
trained on. FFmpeg (PyAV) reads sound and videos, Pillow pictures, libsndfile what FFmpeg does not.
"""
import io
import sys
import warnings
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from math import ceil
from pathlib import Path

import av
import numpy as np
import soundfile
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FPS = 25                                        # frames a second
SAMPLE_RATE = 16000                             # samples a second
HOP = SAMPLE_RATE // FPS                        # samples a frame
VIDEOS = {".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".flv", ".wmv",
          ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
SOUNDS = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".mka",
          ".aif", ".aiff", ".amr", ".caf"}
SIDECARS = {".json", ".npz", ".tsv", ".csv", ".txt", ".md"}    # of clips, or about a folder
FORMATS = "JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"   # for others Pillow starts programs
MAX_PIXELS = 100_000_000                        # of a picture; more is damage or an attack
MAX_GAP = 60                                    # seconds without a frame; more is damage
HDR = {16: "PQ", 18: "HLG"}                     # transfer functions; 100 nits are not white there
NO_CLOCK = {"mp3", "aac"}                       # formats that are a row of packets
# Encoders put silence in front, so many samples. These and "mpegts" do not say how much:
PRIMING = {"mp3": 1105, "mp3float": 1105, "aac": 1024}          # of LAME and FFmpeg
warnings.filterwarnings("ignore", module=r"PIL\.")              # Pillow warns of odd EXIF data

# -------------------------------------------------------------------------------------------- files


def print_any_name():
    """From now on, names in any alphabet can be printed, whatever the terminal's encoding."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def refuse_pipes(path):
    """ValueError for what is there, but is no file: files are opened several times."""
    if path.exists() and not path.is_file():
        raise ValueError("a folder or a pipe, not a file (a pipe can be saved to one first)")


def open_media(path):
    """A file, opened by FFmpeg. With "file:" a colon in its name is no protocol."""
    refuse_pipes(Path(path))
    return av.open(f"file:{path}", metadata_errors="ignore")    # tags are often not UTF-8


def default_track(container, kind):
    """The "video" or "audio" stream that players take, or None. Album covers are no video."""
    streams = container.streams
    for stream in (streams.best(kind), *getattr(streams, kind)):
        is_cover = stream is not None and stream.disposition & Disposition.attached_pic
        if stream is not None and stream.codec_context is not None and not is_cover:
            return stream
    return None

# ----------------------------------------------------------------------------------------- pictures


def read_picture(path):
    """Any picture of FORMATS -> a Pillow image: upright, RGB as in sRGB, on white if transparent.

    Of an animation the first one. FileNotFoundError, or ValueError for what is not a picture, under
    16 px or over MAX_PIXELS."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # the size limit is our own
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{path} has {image.width} x {image.height} pixels: "
                                     "too many, scale it down first")
                image = to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has far too many pixels: scale it down first") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise ValueError(f"{path} is not a picture that can be read: {formats}") from None
    except (OSError, SyntaxError, EOFError, RuntimeError, MemoryError) as error:
        reason = str(error) or type(error).__name__                 # Pillow's, for damaged files
        raise ValueError(f"{path} cannot be read as a picture: {reason}") from None
    if min(image.size) < 16:
        raise ValueError(f"{path} is only {image.width} x {image.height} pixels: a face needs more")
    return image


def to_rgb(image):
    """Any Pillow image -> RGB in sRGB, on white where it is transparent."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):                           # Pillow would clip 16 bits
        image = Image.fromarray(deep_to_uint8(np.asarray(image, np.float32)))
    alpha = None
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = to_srgb(image.convert("RGB") if alpha else image, profile)
    if alpha:
        white = Image.new("RGB", image.size, "white")
        return Image.composite(image, white, alpha)
    return image


def to_srgb(image, profile):
    """A picture without transparency -> RGB. profile: its ICC profile, bytes or None.

    A wide gamut shown as sRGB looks pale. A damaged profile counts as none, as in browsers."""
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
    return image.convert("RGB")


def deep_to_uint8(x):
    """Grey values (H, W) of more than 8 bits -> uint8, by the 16-bit scale if they fit it."""
    sixteen_bits = x.min() >= 0 and 255 < x.max() <= 65535
    low, high = (0, 65535) if sixteen_bits else (np.nanmin(x), np.nanmax(x))
    unit = np.nan_to_num(np.clip((x - low) / max(high - low, 1e-9), 0, 1))
    return np.uint8(255 * unit)

# ------------------------------------------------------------------------------------------- videos


def filtered(container, stream, *filters):
    """Yields the frames of a video after ffmpeg's filters, (name, options) each.

    The filters fill gaps between time stamps. ValueError for HDR, a damaged frame or a gap over
    MAX_GAP."""
    graph = av.filter.Graph()
    stream.codec_context.thread_count = 1       # files are decoded in parallel instead
    source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
    graph.link_nodes(source, *(graph.add(*item) for item in filters), sink).configure()
    last = None
    for frame in chain(container.decode(stream), [None]):       # None: flush the filters
        if frame is not None:
            timed = last is not None and frame.time is not None
            if frame.is_corrupt or (timed and frame.time - last > MAX_GAP):
                raise ValueError(f"damaged video at {frame.time} s")
            if frame.color_trc in HDR:
                raise ValueError(f"HDR video ({HDR[frame.color_trc]}): convert it to SDR first")
            last = frame.time
        graph.push(frame)
        with suppress(BlockingIOError, EOFError):               # raised when the sink is empty
            while True:
                yield graph.pull()


def as_displayed(picture, frame):
    """picture (H, W, 3) turned and mirrored as the display matrix of its frame says."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).astype(int).tolist()
            if abs(b) > abs(a):                 # pixel (x, y) is shown at (a x + c y, b x + d y)
                picture, a, d = picture.transpose(1, 0, 2), c, b
            return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return picture


def read_video(path):
    """Yields uint8 (H, W, 3) at 25 fps; a picture file yields one.

    Frame i is what is on screen (i + 0.5) / 25 s after the first picture. Pixels are made square,
    fields become frames; a turned or mirrored video is shown as players do. ValueError or av's
    error for a bad file."""
    if path.suffix.lower() in PICTURES:
        yield np.asarray(read_picture(path))
        return
    with open_media(path) as container:
        if not container.streams.video:
            raise ValueError("no video")
        stream = default_track(container, "video")
        if stream is None:
            raise ValueError("no video of a known kind")
        deinterlaced = "bwdif", "mode=send_frame:deint=interlaced"
        from_zero = "setpts", "PTS-STARTPTS"
        at_25_fps = "fps", f"{FPS}:round=near"
        square_pixels = "scale", f"iw*{stream.sample_aspect_ratio or 1}:ih"
        count = 0
        for frame in filtered(container, stream, deinterlaced, from_zero, at_25_fps,
                              square_pixels):
            count += 1
            yield as_displayed(frame.to_ndarray(format="rgb24"), frame)
        promised = float((stream.duration or 0) * stream.time_base)
        if count / FPS < 0.9 * promised - 0.1:
            raise ValueError(f"truncated: only {count / FPS:.2f} s can be decoded")

# -------------------------------------------------------------------------------------------- sound


def first_picture_time(path):
    """When the first picture is shown, s on the file's clock, or None if there is no picture."""
    with open_media(path) as container:
        stream = default_track(container, "video")
        if stream is not None:
            with suppress(av.FFmpegError, StopIteration):
                return next(container.decode(stream)).time or 0.0
    return None


def decode_track(container, stream):
    """Yields the frames of a sound track to its end, whatever length the file claims.

    A packet of something else is left out: joined MP3s have tags between them. ValueError if that
    is more than every tenth packet."""
    packets, bad = 0, 0
    for packet in container.demux(stream):
        packets += 1
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            bad += 1
    if bad > 1 + packets // 10:
        raise ValueError(f"damaged: {bad} of {packets} packets of sound cannot be decoded")


def ffmpeg_blocks(path, strict):
    """Yields (time s or None, rate, layout, float32 (n, channels)) of the default track."""
    with open_media(path) as container:
        stream = default_track(container, "audio")
        if stream is None:
            return
        name = stream.codec_context.name
        has_clock = container.format.name not in NO_CLOCK
        extra = 0                               # samples of silence still to be left out
        if container.format.name == "mpegts" or not (has_clock or stream.start_time):
            extra = PRIMING.get(name, 0)        # an MP3 that starts later has a header that says it
        to_float, kind = None, None
        for frame in decode_track(container, stream):
            if strict and frame.is_corrupt:
                raise ValueError(f"damaged audio at {frame.time} s")
            if kind != (frame.format.name, frame.layout.name, frame.sample_rate):
                kind = frame.format.name, frame.layout.name, frame.sample_rate
                to_float = av.AudioResampler(format="flt")          # changes the format only
            rate, layout = frame.sample_rate, frame.layout
            time = frame.time if has_clock else None
            for part in to_float.resample(frame):
                block = part.to_ndarray().reshape(-1, layout.nb_channels)
                skipped = min(extra, len(block))
                extra -= skipped
                if skipped < len(block):
                    late = None if time is None else time + skipped / rate
                    yield late, rate, layout.name, block[skipped:]


def libsndfile_blocks(path):
    """The same by another reader, which has formats that FFmpeg has not."""
    with soundfile.SoundFile(path) as file:
        layout = f"{file.channels} channels"
        for block in file.blocks(1 << 16, dtype="float32", always_2d=True):
            yield None, file.samplerate, layout, block


def is_plain_vorbis(path):
    """Is it one Ogg Vorbis? FFmpeg loses its end, libsndfile all but the first of joined ones."""
    if path.suffix.lower() not in (".ogg", ".oga"):
        return False
    with suppress(soundfile.LibsndfileError):
        first_pages = path.read_bytes().count(b"OggS\0\2")
        return first_pages == 1 and soundfile.info(path).subtype == "VORBIS"
    return False


def read_blocks(path, strict):
    """Blocks by FFmpeg, or, where it finds no sound, by libsndfile. None if there is no sound."""
    refuse_pipes(path)
    if is_plain_vorbis(path):
        yield from libsndfile_blocks(path)
        return
    found, failure = False, None
    try:
        for block in ffmpeg_blocks(path, strict):
            found = True
            yield block
    except av.FFmpegError as error:
        if found:
            raise
        failure = error
    if not found:
        try:
            yield from libsndfile_blocks(path)
        except soundfile.LibsndfileError:
            if failure:
                raise failure from None


def sound_blocks(path, strict=False):
    """Yields (start s, rate, layout, float32 (n, channels)) of a file's default sound track.

    Times are counted from the first picture, or from the first sample where there is none; gaps
    and a late start are silence, overlaps are cut; sound before the first picture has negative
    times. `strict` refuses what only a recording may have: damaged frames, a clock that jumps by
    over MAX_GAP. ValueError for under 4000 samples a second, NaN or infinity."""
    zero, due = None, None                      # on the file's clock: time 0, the next sample
    for time, rate, layout, block in read_blocks(path, strict):
        if rate < 4000:
            raise ValueError(f"{rate} samples a second: damaged, or too few for speech")
        if not np.isfinite(block).all():
            raise ValueError("it contains NaN or infinite samples")
        if due is None:
            time = time or 0.0
            picture = first_picture_time(path)
            zero = time if picture is None else picture
            due = min(time, zero)
        gap = 0.0 if time is None else time - due
        if strict and gap > MAX_GAP:
            raise ValueError(f"damaged audio at {time} s")
        if 0.02 < gap <= MAX_GAP:
            silence = np.zeros((round(gap * rate), block.shape[1]), np.float32)
            yield due - zero, rate, layout, silence
            due += len(silence) / rate
        elif -1 <= gap < -0.04:                 # an overlap: that moment has its sound already
            block = block[round(-gap * rate):]
        elif abs(gap) > 1:                      # another clock from here on: nothing is missing
            zero, due = zero + gap, due + gap
        yield due - zero, rate, layout, block
        due += len(block) / rate


def resampled(blocks, layout, rate):
    """Blocks (rate, layout, float32 (n, channels)) -> float32 (n, channels) at one rate and layout.

    By FFmpeg, also if the blocks' own rates or layouts change. Exactly their seconds, rounded up to
    a whole sample."""
    seconds, made, kind, resampler = Fraction(0), 0, None, None

    def convert(frame):
        parts = resampler.resample(frame) if resampler else []
        parts = [part.to_ndarray().reshape(-1, part.layout.nb_channels) for part in parts]
        return [np.float32(part / 2**31) for part in parts]

    for own_rate, own_layout, block in blocks:
        if not len(block):                      # FFmpeg has no frames without samples
            continue
        if kind != (own_rate, own_layout):
            for part in convert(None):
                made += len(part)
                yield part
            kind = own_rate, own_layout         # 32-bit integers: a down-mix to float would clip
            resampler = av.AudioResampler("s32", layout, rate)
        seconds += Fraction(len(block), own_rate)
        packed = np.ascontiguousarray(block).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, "flt", own_layout)
        frame.sample_rate = own_rate
        for part in convert(frame):
            made += len(part)
            yield part
    if resampler:
        channels = av.AudioLayout(layout).nb_channels
        rest = np.concatenate([*convert(None), np.zeros((rate // 10, channels), np.float32)])
        yield rest[:max(0, ceil(seconds * rate) - made)]


def known_layout(blocks):
    """Blocks of sound_blocks() without their times; channels of unknown places are averaged."""
    for _, rate, layout, block in blocks:
        if layout.endswith("channels"):
            layout = {1: "mono", 2: "stereo"}.get(block.shape[1], "mono")
            if block.shape[1] > 2:
                block = block.mean(1, keepdims=True)
        yield rate, layout, block


def only_channel(path):
    """The number of the loudest channel if the others cancel it in the mix, else None.

    A balanced microphone plugged in wrongly gives a right channel of minus the left one."""
    blocks = known_layout(sound_blocks(path))
    first = next(blocks, None)
    if first is None or first[2].shape[1] == 1:
        return None
    channels = np.zeros(first[2].shape[1])      # energy of each

    def counted():
        for part in resampled(chain([first], blocks), first[1], SAMPLE_RATE):
            channels[:] += np.square(part, dtype=np.float64).sum(0)
            yield SAMPLE_RATE, first[1], part

    mix = sum(np.square(part, dtype=np.float64).sum()
              for part in resampled(counted(), "mono", SAMPLE_RATE))
    return int(channels.argmax()) if mix < 0.01 * channels.max() else None


def mono_16k(path, strict=False, from_picture=False):
    """Yields float32 (n,) in [-1, 1] at 16 kHz: FFmpeg's mix of a file's channels.

    from_picture: without what comes before the first picture. Nothing if there is no sound."""
    channel = only_channel(path)
    blocks = sound_blocks(path, strict)
    first = next(blocks, None)
    if first is None:
        return
    early = round(-first[0] * SAMPLE_RATE) if from_picture else 0
    blocks = known_layout(chain([first], blocks))
    if channel is not None:
        blocks = ((rate, "mono", block[:, [min(channel, block.shape[1] - 1)]])
                  for rate, _, block in blocks)
    for part in resampled(blocks, "mono", SAMPLE_RATE):
        yield part[early:, 0]
        early = max(0, early - len(part))


def read_audio(path, samples):
    """A video's sound from its first picture on -> int16 (samples,) at 16 kHz, or (0,) if silent.

    Padded or cut to `samples`; a late start and gaps become silence."""
    parts, missing = [], samples
    for part in mono_16k(path, strict=True, from_picture=True):
        parts.append(np.rint(part[:missing] * 32768).clip(-32768, 32767).astype(np.int16))
        missing -= len(parts[-1])
        if not missing:
            break
    return np.concatenate([*parts, np.zeros(missing, np.int16)]) if parts else np.zeros(0, np.int16)

# ----------------------------------------------------------------------------------------- folders


def media_files(folder, endings):
    """The files with one of the endings that lie directly in a folder, by name."""
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in visible if path.suffix.lower() in endings)


def clip_names(files):
    """path -> its name without the ending, or with it where a.mov lies beside a.mp4."""
    taken = Counter(text.casefold() for path in files for text in (path.stem, path.name))
    return {path: path.stem if taken[path.stem.casefold()] == 1 else path.name for path in files}


def note_unread(folder, endings=frozenset(VIDEOS | PICTURES)):
    """Say in one line what lies in a folder and is not read. Sidecars and hidden files are used."""
    known = endings | SIDECARS
    others = [p for p in folder.iterdir() if not p.name.startswith(".")]
    folders = sum(path.is_dir() for path in others)
    endings = Counter(p.suffix.lower() for p in others if p.is_file())
    unread = [f"{ending or 'no ending'} {n}" for ending, n in endings.items()
              if ending not in known]
    if folders:
        unread.append(f"folders {folders}")
    if unread:
        print(f"note: not read in {folder}: {', '.join(unread)}", file=sys.stderr)
