"""Films, by PyAV."""

import contextlib
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from lib import units
from lib.units import Pictures, UnreadableImage
from utils import atomic_write

DEMUXERS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}
DEMUXERS |= {".avi": "avi", ".gif": "gif"}  # by name, or a playlist could open other files
COPIED = ("aac", "mp3", "ac3", "eac3", "opus", "alac", "flac")  # sound that mp4 players know


@dataclass
class Film(Pictures):
    """The frames of a film, in order only; `times` are those read so far, in `time_base`."""

    times: list[int] = field(default_factory=list)
    time_base: Fraction = Fraction(1, 25)

    def __iter__(self) -> Iterator[np.ndarray]:
        self.times.clear()
        with units.decoding(self.paths[0]), open_film(self.paths[0]) as (container, stream):
            for k, frame in enumerate(container.decode(stream)):
                if frame.width * frame.height > Image.MAX_IMAGE_PIXELS:
                    raise UnreadableImage(f"a frame is {units.TOO_LARGE}")
                self.times.append(k if frame.pts is None else frame.pts)
                turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                yield np.ascontiguousarray(turned)  # (H, W, 3)


@contextlib.contextmanager
def open_film(path: Path) -> Iterator[tuple]:
    """The container and its first video stream."""
    av = units.need("av", "film")
    with av.open(str(path.absolute()), format=DEMUXERS[path.suffix.lower()]) as container:
        if not container.streams.video:
            raise UnreadableImage("it has no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableImage("its video is of a kind that PyAV does not decode")
        units.check_size(stream.height, stream.width, 3, 3)
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
        yield container, stream


def read_film(paths: list[Path], channels: int, axis: int) -> Pictures:
    """The frames of a film; `count` is what its header says, 0 where it says nothing."""
    (path,) = paths
    if channels not in (0, 3):
        raise UnreadableImage(f"a film has 3 channels, not {channels}")
    with open_film(path) as (_, stream):
        film = Film(paths, stream.frames, np.dtype(np.uint8), None, (0.0, 255.0))
        film.time_base = stream.time_base
        film.get = lambda i: next(itertools.islice(film, i, None))
        film.geometry = {"rate": stream.average_rate or stream.guessed_rate}
        film.geometry["aspect"] = stream.codec_context.sample_aspect_ratio
    return film


def write_film(paths, source: Film, pictures: Iterator, limits, note: str) -> None:
    """H.264 in mp4, yuv420p, each frame at its time in the source; the sound as it is."""
    av = units.need("av", "film")
    first = next(pictures, None)
    if first is None:
        raise UnreadableImage("it has no frames")
    height, width = (-(-n // 2) * 2 for n in first.shape[:2])  # yuv420p halves them
    with (
        atomic_write(paths[0]) as file,
        av.open(file.name, "w", format="mp4", options={"movflags": "faststart"}) as target,
        open_film(source.paths[0]) as (sound, _),
    ):
        stream = target.add_stream("libx264", rate=source.geometry["rate"])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"}
        stream.codec_context.time_base = source.time_base
        if source.geometry["aspect"]:
            stream.codec_context.sample_aspect_ratio = source.geometry["aspect"]  # of a pixel
        target.metadata["comment"] = note

        def encode() -> Iterator[tuple[float, list]]:
            for k, picture in enumerate(itertools.chain([first], pictures)):
                pixels = units.to_stored(picture, np.dtype(np.uint8))
                pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
                edge = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)]
                frame = av.VideoFrame.from_ndarray(np.pad(pixels, edge, "edge"), format="rgb24")
                frame.pts, frame.time_base = source.times[k], source.time_base
                yield frame.time, stream.encode(frame)
            yield math.inf, stream.encode()  # what it still holds

        # the sound first: its track must be there before the first frame is written
        packets = heapq.merge(copy_sound(target, sound), encode(), key=lambda pair: pair[0])
        for _, group in packets:
            target.mux(group)


def copy_sound(target, source) -> Iterator[tuple[float, object]]:
    """(seconds, packets) of the first sound track; as AAC if mp4 players may not know it."""
    if not source.streams.audio:
        return
    track = source.streams.audio[0]
    if track.codec_context.codec.canonical_name in COPIED:
        copy = target.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.dts is not None:  # the last one is empty
                seconds = float(packet.dts * packet.time_base)
                packet.stream = copy
                yield seconds, packet
        return
    encoder = target.add_stream("aac", rate=track.rate)
    for frame in itertools.chain(source.decode(track), [None]):  # None: what it still holds
        yield (frame.time or 0.0) if frame else math.inf, encoder.encode(frame)
