"""All rulers together: which networks are there, what is kept of the videos, the scale.

evaluate.py walks through the videos; the functions here turn some frames into figures and keep what
a comparison of sets needs. The scale is made of the real clips: other people, other audio, silence,
blur. Distances between sets compare the same people: frames of a system with real frames of the
same clips, real frames with earlier ones of the same clips.
"""
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import select_device
from data import FPS, HOP, sidecar_text
from measure import fid, identity, pixels, sync, video
from measure.landmarks import Landmarker, count_blinks
from measure.report import METRICS, SHEET, WINDOWS, nanmean, summarise_rows
from vae import load_vae

BLURS = (1, 2, 3)                                       # px, rows of the scale


@dataclass(frozen=True)
class Item:
    """One video of one system, and what it is compared with."""
    name: str
    video: Path
    real: Path | None = None            # the real clip of this name
    reference: Path | None = None       # the portrait (default: first frame of real, or of video)
    how: str = "as it is"               # or "VAE only": encoded and decoded first, or "frozen"

    @property
    def person(self):
        """Name of the real clip that shows the same person; None if unknown."""
        return self.real.stem if self.real else video.sidecar(self.video).get("person")

    @property
    def clips(self):
        """Names of all real clips that it is compared with: a long video has sound of many."""
        used = [] if self.real else video.sidecar(self.video).get("clips", [])
        return {self.person, *(name for name, _ in used)}


class Rulers:
    """All networks that measure. Each one that is missing is a line in .notes."""

    def __init__(self, options):
        self.notes = []
        self.options = options
        self.device, _ = select_device(options.device, "float32")
        self.landmarker = Landmarker(device=self.device)
        self.fid = self.official("fid", fid.inception_features)
        self.fvd = self.official("fvd", fid.i3d_features)
        self.syncnet = self.official("syncnet", sync.load_syncnet)
        self.arcface = self.official("arcface", identity.arcface)
        self.sface = self.public("identity distance (SFace)", identity.sface, identity.NOTE)
        self.lite0 = self.public("KID and the perceptual distance", fid.lite0, fid.LITE0_NOTE)
        self.lips = self.public("the public sync score", sync.lip_predictor, sync.WHISPER_NOTE)
        self.vae = None
        self.chunk = None                               # frames of a chunk
        self.overlap = 0                                # frames that two chunks share
        if options.weights:
            config = json.loads((options.weights / "config.json").read_text(encoding="utf-8"))
            self.vae = load_vae(options.weights, self.device)
            self.chunk = config["frames"]
            self.overlap = config["continuity_frames"]
        else:
            self.notes.append("no --weights given: VAE only and seams are left out")

    def official(self, kind, load):
        path = getattr(self.options, f"{kind}_weights")
        if path is None:
            self.notes.append(f"{kind.upper()} is left out: no --{kind}-weights given")
            return None
        self.notes.append(f"{kind}: {path}, sha256 {fid.check_file(path, kind)[:16]}")
        return load(path, self.device)

    def public(self, name, load, how):
        network = load(self.device)
        if network is None:
            self.notes.append(f"{name} is left out: {how}")
        return network

    def frames(self, item):
        """The frames of a video as they are measured."""
        size = self.options.size
        if item.how == "frozen":
            return video.frozen(item.video, size)
        frames = video.squares(item.video, size)
        if item.how == "VAE only":
            return video.as_written(video.vae_only(self.vae, frames, self.chunk), size)
        return frames

    def embed(self, frames, points):
        """-> {"sface": (T, 128), "arcface": (T, 512)} unit vectors, 0 where there is no face."""
        faces = identity.align(frames, points)
        seen = np.isfinite(np.asarray(points)[:, 0, :1])  # (T, 1)
        networks = {"sface": self.sface, "arcface": self.arcface}
        return {name: net(faces) * seen for name, net in networks.items() if net is not None}


@dataclass
class Results:
    """What is kept of the videos: sums and samples of features, curves of the real clips."""
    groups: set = field(default_factory=set)            # of people: frozensets of clip names
    gaussians: dict = field(default_factory=dict)       # {(system, metric, window or group)}
    samples: dict = field(default_factory=dict)         # {(system, person): fid.Sample}
    gaps: dict = field(default_factory=dict)            # {real clip: lip gap (T,)}
    sounds: dict = field(default_factory=dict)          # {file: predicted lip gap (T,)}
    references: dict = field(default_factory=dict)      # {real clip: SFace vector}
    faces: dict = field(default_factory=dict)           # {real clip: SFace vectors of its frames}
    tiles: dict = field(default_factory=dict)           # of the contact sheet
    blur: dict = field(default_factory=dict)            # {"blur 1 px": rows}

    def add(self, system, metric, keys, features):
        """Into the sums of FID or FVD; of real clips also into those of both halves."""
        for key in keys:
            self.gaussians.setdefault((system, metric, key), fid.Gaussian()).add(features)
        if system == "real":
            half = len(features) // 2
            self.add("earlier", metric, [None], features[:half])
            self.add("later", metric, [None], features[half:])

    def sample(self, system, person, features):
        """Into the samples of KID; of real clips also into those of both halves."""
        self.samples.setdefault((system, person), fid.Sample()).add(features)
        if system == "real":
            half = len(features) // 2
            self.sample("earlier", person, features[:half])
            self.sample("later", person, features[half:])

    def people(self, system):
        """Names of the real clips whose people a system shows, as far as KID has seen them."""
        return {person for name, person in self.samples if name == system and person}

    def sampled(self, system, people):
        """-> features (n, D) of a system's videos of these people."""
        rows = [row for p in sorted(people) for row in self.samples[system, p].rows]
        return np.array(rows)


class Subject:
    """A video under measurement: its sound, its ground truth, its reference."""

    def __init__(self, rulers, results, system, item):
        size = rulers.options.size
        self.system = system
        self.item = item
        seconds, sound_seconds, self.notes = video.probe(item.video)
        source = item.video if sound_seconds else item.real
        self.sound = video.sound_of(source, seconds) if source else np.zeros(0, np.float32)
        if not sound_seconds and len(self.sound):
            self.notes.append("the real clip's sound is used")
        if not item.real:
            self.notes.append("no real clip of this name")
        self.predicted = None
        if rulers.lips and len(self.sound):
            if source not in results.sounds:
                results.sounds[source] = rulers.lips(self.sound, len(self.sound) // HOP)
            self.predicted = results.sounds[source]
        self.truth = None if system == "real" else real_gap(results, item)
        self.phones = pixels.phones_of(item.real or item.video)
        picture = item.reference or item.real or item.video
        frame = np.stack([next(video.squares(picture, size))])
        points, presence = rulers.landmarker.points(frame)
        found = bool(presence[0] > 0.5)
        if not found:
            self.notes.append("no face in the reference: identity is left out")
        self.reference = rulers.embed(frame, points) if found else {}
        self.colour = pixels.colour(frame, pixels.face_box(points, size))
        self.distances = {}                             # {frame number: SFace distance}


def real_gap(results, item):
    """Lip gap of the real clip; of a long video, those of the clips that gave it its sound."""
    if item.real:
        return results.gaps.get(item.real.stem)
    clips = video.sidecar(item.video).get("clips", [])
    if not clips or any(name not in results.gaps for name, _ in clips):
        return None
    return np.concatenate([results.gaps[name][:frames] for name, frames in clips])

# --------------------------------------------------------------------- figures of sampled frames


def identity_row(rulers, results, subject, frames, points, sampled, start):
    """ArcFace similarity and SFace distance to the reference; tiles of the contact sheet.

    A frame without a face has similarity 0 and distance 1. sampled: indices into the frames.
    """
    places = {t: max(0, t * FPS - 1) - start for t in SHEET}
    tiles = {t: i for t, i in places.items() if 0 <= i < len(frames)}
    chosen = sorted({*sampled.tolist(), *tiles.values()})
    regular = np.isin(chosen, sampled)
    vectors = rulers.embed(frames[chosen], points[chosen]) if subject.reference else {}
    row = {}
    distance = {}
    if "arcface" in vectors and regular.any():
        similarity = vectors["arcface"] @ subject.reference["arcface"][0]
        row["arcface"] = float(similarity[regular].mean())
    if "sface" in vectors:
        away = identity.cosine_distance(vectors["sface"], subject.reference["sface"])
        distance = dict(zip(chosen, away.tolist()))
        if regular.any():
            row["sface"] = float(away[regular].mean())
            row["sface_worst"] = float(away[regular].max())
        subject.distances |= {int(i) + start: distance[int(i)] for i in sampled}
        if subject.system == "real":
            results.references[subject.item.name] = subject.reference["sface"][0]
            results.faces.setdefault(subject.item.name, []).extend(vectors["sface"][regular])
    if subject.item.how != "frozen":
        shots = results.tiles.setdefault(subject.item.name, {}).setdefault(subject.system, {})
        shots |= {t: (frames[i].copy(), distance.get(i)) for t, i in tiles.items()}
    return row


def lite0_row(rulers, results, subject, frames, real):
    """Sampled frames into KID; perceptual distance to the same frames of the real clip, as far as
    there are any."""
    if not len(frames):
        return {}
    levels, features = fid.lite0_features(rulers.lite0, frames)
    results.sample(subject.system, subject.item.person, features)
    both = min(len(frames), len(real))
    if subject.system == "real" or not both:
        return {}
    true_levels, _ = fid.lite0_features(rulers.lite0, real[:both])
    away = fid.perceptual([level[:both] for level in levels], true_levels)
    return {"perceptual": float(away.mean())}


def measure_blur(rulers, results, subject, frames, points, box):
    """Rows of the scale: sampled frames of a real clip's first segment, blurred."""
    for radius in BLURS:
        name = f"blur {radius} px"
        soft = video.blurred(frames, radius)
        row = {"system": name, "video": subject.item.name}
        row["sharpness"] = pixels.sharpness(soft, box)
        if "sface" in subject.reference:
            vectors = rulers.embed(soft, points)["sface"]
            away = identity.cosine_distance(vectors, subject.reference["sface"])
            row["sface"] = float(away.mean())
            row["sface_worst"] = float(away.max())
        if rulers.lite0:
            levels, features = fid.lite0_features(rulers.lite0, soft)
            results.sample(name, subject.item.person, features)
            true_levels, _ = fid.lite0_features(rulers.lite0, frames)
            row["perceptual"] = float(fid.perceptual(levels, true_levels).mean())
        results.blur.setdefault(name, []).append(row)

# ----------------------------------------------------------------------------------- a whole video


def whole_video(subject, rows, gap, blink):
    """Figures of a whole video; the lips' share of every segment goes into its row."""
    truth, phones = subject.truth, subject.phones
    speech = pixels.speech_frames(phones, subject.sound, len(gap))
    for row in rows:
        a = round(row["start"] * FPS)
        b = a + row["frames"]
        true = None if truth is None else truth[a:b]
        row |= pixels.lip_row(gap[a:b], true, phones, speech[a:b], a)
    keys = [key for key in METRICS if any(key in row for row in rows)]
    video = {key: nanmean([row.get(key, np.nan) for row in rows]) for key in keys}
    video |= pixels.lip_row(gap, truth, phones, speech)
    if subject.predicted is not None:
        video |= sync.lip_sync(gap, subject.predicted[:len(gap)])
    video["blinks"] = count_blinks(blink) / (len(gap) / FPS / 60)
    distances = subject.distances
    if distances:
        video["sface_first"] = distances[0]
        early = [away for i, away in distances.items() if 60 <= i <= 80]
        video["sface_3s"] = nanmean(early)
        video["sface_worst"] = max(distances.values())
    if video["faces"] < 0.5:
        subject.notes.append(f"no face in {100 - 100 * video['faces']:.0f} % of the frames: "
                             "what follows from the face means nothing")
    if truth is not None and abs(len(truth) - len(gap)) > 1:
        subject.notes.append(f"{len(gap)} frames, {len(truth)} in the real clip: "
                             "the common part is compared")
    return video

# ------------------------------------------------------------------------------------------- scale


def identities(clips):
    """Real clips -> {name: who}. NAME.json says who; clips that name nobody are one person a
    folder."""
    return {path.stem: sidecar_text(path, "identity", path.parent.name) for path in clips}


def another(names, name, who=None):
    """The clip half a list away, or the next one of another person if `who` is given; None if
    there is none. Neighbours by name may say nearly the same."""
    k = names.index(name)
    order = [names[(k + len(names) // 2 + i) % len(names)] for i in range(len(names))]
    order = [other for other in order if other != name]
    if who:
        order = [other for other in order if who[other] != who[name]]
    return order[0] if order else None


def scale_rows(rulers, results, clips):
    """Rows of `other people`, `other audio`, `silence` and `blur`, made of the real clips."""
    names = [path.stem for path in clips if path.stem in results.gaps]
    paths = {path.stem: path for path in clips}
    who = identities(clips)
    rows = {"other people": [], "other audio": [], "silence": [], **results.blur}
    longest = max((len(results.gaps[name]) for name in names), default=0)
    silence = rulers.lips(np.zeros(0, np.float32), longest) if rulers.lips else None
    for name in names:
        gap = results.gaps[name]
        other = another(names, name, who)
        if other in results.references and name in results.faces:
            away = identity.cosine_distance(np.array(results.faces[name]),
                                            results.references[other])
            rows["other people"].append({"video": name, "sface": float(away.mean()),
                                         "sface_worst": float(away.max())})
        other = another(names, name)
        if other:
            phones = pixels.phones_of(paths[name])
            row = {"video": name}
            if phones:
                speech = pixels.speech_frames(phones, [], len(gap))
                row["lips"] = pixels.correlation(results.gaps[other], gap, speech)
            if paths[other] in results.sounds:
                row |= sync.lip_sync(gap, results.sounds[paths[other]][:len(gap)])
            rows["other audio"].append(row)
        if rulers.lips:
            rows["silence"].append({"video": name} | sync.lip_sync(gap, silence[:len(gap)]))
    return {name: some for name, some in rows.items() if some}


def set_distances(results, system, group, window=None):
    """FID, FVD and KID of a system, against real frames of the same people. group: frozenset of
    real clips' names. Real clips themselves: earlier frames against later ones."""
    out = {}
    real = system == "real"
    for metric in ("fid", "fvd"):
        a = results.gaussians.get(("later" if real else system, metric, window))
        b = results.gaussians.get(("earlier", metric, None) if real else ("real", metric, group))
        if a and b and min(a.n, b.n) > 1:
            out[metric] = {"mean": fid.frechet(a, b), "sd": None, "n": a.n}
    people = results.people("later" if real else system) & results.people("real")
    if window is None and people:
        out |= kid(results.sampled("later" if real else system, people),
                   results.sampled("earlier" if real else "real", people))
    return out


def kid(x, y):
    """-> {"kid": summary} of two samples, {} if one is too small."""
    if min(len(x), len(y)) < 2:
        return {}
    return {"kid": {"mean": 1000 * fid.kernel_distance(x, y), "sd": None, "n": len(x)}}


def other_people_kid(results, who):
    """KID of real clips of one half of the people against the other half."""
    people = results.people("real") & set(who)
    names = sorted({who[person] for person in people})
    first = {person for person in people if who[person] in names[:len(names) // 2]}
    if len(names) < 2:
        return {}
    return kid(results.sampled("real", first), results.sampled("real", people - first))

# ----------------------------------------------------------------------------------------- summary


def people_of(items):
    """Names of the real clips whose people a system shows."""
    return frozenset(item.person for item in items if item.person)


def windows_of(rows):
    """Rows of segments -> {t: those of the 5 s that end at t}, t of WINDOWS."""
    whole = [row for row in rows if row["frames"] >= video.SEGMENT]
    ends = {t: [row for row in whole if round(row["start"] * FPS) + video.SEGMENT == t * FPS]
            for t in WINDOWS}
    return {t: some for t, some in ends.items() if some}


def summarise(tools, results, systems, segment_rows, video_rows):
    """-> {"systems", "scale", "drift"}: summaries by name, and all notes."""
    table = {}
    scale = {}
    drift = {}
    clips = [item.video for item in systems["real"]]
    who = identities(clips)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for system, items in systems.items():
            group = people_of(items)
            own = [row for row in video_rows if row["system"] == system]
            table[system] = summarise_rows(own) | set_distances(results, system, group)
            own = [row for row in segment_rows if row["system"] == system]
            for t, rows in windows_of(own).items():
                summary = summarise_rows(rows) | set_distances(results, system, group, t)
                drift.setdefault(system, {})[str(t)] = summary
        for name, rows in scale_rows(tools, results, clips).items():
            scale[name] = summarise_rows(rows) | set_distances(results, name, frozenset())
        if "other people" in scale:
            scale["other people"] |= other_people_kid(results, who)
    notes = list(tools.notes)
    if len(set(who.values())) < 2:
        notes.append("all real clips show one person: `other people` is left out")
    remarks = Counter((row["system"], row["note"]) for row in video_rows if row.get("note"))
    notes += [f"{system}: {note} ({n} videos)" for (system, note), n in remarks.items()]
    notes += dict.fromkeys(str(warning.message) for warning in caught)
    return {"systems": table, "scale": scale, "drift": drift}, notes
