"""Photos in, faces out: decodes a photo, finds and aligns its faces, and has `arcface` embed them.

The steps are decode.py, detect.py and align.py beside this file, the same files as in our Python package. `arcface` is
called with all faces of a photo at once (BLS); while this instance waits, others send theirs, and its dynamic batcher
mixes them. A photo that cannot be used, and a request that makes no sense, are refused with INVALID_ARG; nothing else
is: no face is an answer.
"""

import faulthandler
import hashlib
import json
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import triton_python_backend_utils as pb_utils
from align import FACE_SIZE, align_face, magnification
from decode import BadPhoto, Photo, from_base64
from detect import MAX_SIDE, MIN_SCORE, MIN_SIZE, detector_id, find_faces
from PIL import Image
from refusal import NUMBER_EXPECTED, PHOTO_REFUSED
from scrfd import Scrfd
from yunet import open_yunet

BATCH = 64  # max_batch_size of `arcface`
STAGES = ("decode", "detect", "align", "embed")
TELL_EVERY_S = 0.5  # how far the metrics may be behind
FACES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]


class TritonPythonModel:
    """One instance; several run at a time."""

    @staticmethod
    def auto_complete_config(config):
        """Nothing to add: config.pbtxt says it all."""
        return config

    def initialize(self, args):
        """Load the detector."""
        config = json.loads(args["model_config"])
        told = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.embedder = told["embedder"]
        self.max_bytes, self.max_pixels = int(told["max_bytes"]), int(told["max_pixels"])
        self.max_faces = int(told["max_faces"])
        self.stuck_after_s = float(told.get("stuck_after_s", 60))
        faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # say where, then die of it
        self.outputs = [output["name"] for output in config["output"]]
        threads = int(told["threads"])
        cv2.setNumThreads(threads)
        Image.core.set_blocks_max(1)  # Pillow keeps up to 16 MB for the next photo, whose pages need no faults again
        self.look, self.kind, self.sha256 = _detector(Path(args["model_repository"]) / args["model_version"], threads)
        warm_up = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
        find_faces(self.look, Photo(warm_up).pixels())  # Pillow imports its formats with the first photo
        self.meter = Meter()

    def finalize(self):
        """End the thread that tells Triton the sums."""
        self.meter.close()

    def execute(self, requests):
        """Answer each request on its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            asked = Asked(request, self.max_faces)
            wanted = set(request.requested_output_names())
            if wanted >= set(self.outputs):  # who names no output asks for all
                wanted -= asked.not_asked_for
            found = {"detector": self._detector_id(asked)}
            if asked.probe:
                wanted &= {"score", "detector"}
                found["score"] = np.empty(0, np.float32)
            else:
                encoded = _bytes_of(pb_utils.get_input_tensor_by_name(request, "image").as_numpy())
                found |= self._faces(encoded, asked)
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(found[name])) for name in sorted(wanted)]
            if not asked.probe:
                self.meter.answered(len(found["box"]))
            return pb_utils.InferenceResponse(output_tensors=tensors)
        except BadPhoto as exc:
            self.meter.add("refused")
            return _error(f"{PHOTO_REFUSED}{exc}", pb_utils.TritonError.INVALID_ARG)
        except MemoryError:
            self.meter.add("refused")
            return _error(f"{PHOTO_REFUSED}not enough memory for it", pb_utils.TritonError.INVALID_ARG)
        except WrongCall as exc:
            return _error(f"photo_faces: {exc}", pb_utils.TritonError.INVALID_ARG)
        except Failed as exc:
            return _error(f"photo_faces: {exc}", pb_utils.TritonError.UNAVAILABLE)
        except Exception as exc:
            return _error(f"photo_faces: {type(exc).__name__}: {exc}", pb_utils.TritonError.INTERNAL)

    def _detector_id(self, asked):
        limits = {"min_score": asked.min_score, "min_size": asked.min_size, "max_faces": asked.max_faces}
        return np.array([detector_id(self.kind, self.sha256, self.look.looks, **limits).encode()], np.object_)

    def _faces(self, encoded, asked):
        with _ends_after(self.stuck_after_s):
            rows, landmarks, crops = self._crops(encoded, asked)
        with self.meter.stage("embed"):
            embedded = self._embed(crops)
        return {"box": rows[:, :4], "score": rows[:, 14], "landmarks": landmarks, "crop": crops, **embedded}

    def _crops(self, encoded, asked):
        """The detector's rows, their landmarks (F,5,2) and the crops (F,112,112,3), in the photo's pixels."""
        with self.meter.stage("decode"):
            if len(encoded) > self.max_bytes:
                raise BadPhoto(f"{len(encoded):,} bytes; expected at most {self.max_bytes:,}")
            photo = Photo(from_base64(encoded), self.max_pixels)
            reduction = photo.reduction(MAX_SIDE)
            pixels = photo.pixels(reduction)
        with self.meter.stage("detect"):
            limits = {"min_score": asked.min_score, "min_size": asked.min_size, "max_faces": asked.max_faces}
            rows = find_faces(self.look, pixels, 1 / reduction, **limits)
        landmarks = rows[:, 4:14].reshape(-1, 5, 2)
        if reduction > 1:
            finer = photo.finer(reduction, max(map(magnification, landmarks), default=0))
            if finer < reduction:  # a face so small that the crop has room for more of the photo's pixels
                with self.meter.stage("decode"):
                    reduction, pixels = finer, photo.pixels(finer)
        with self.meter.stage("align"):
            crops = np.empty((len(rows), FACE_SIZE, FACE_SIZE, 3), np.uint8)
            for crop, points in zip(crops, landmarks, strict=True):
                crop[:] = align_face(pixels, points, 1 / reduction)
        return rows, landmarks, crops

    def _embed(self, crops):
        """embedding, norm and contract of the crops, which `arcface` makes; batches of 64 one after the other."""
        names = ["embedding", "norm", "contract"]
        parts = {name: [] for name in names}
        for start in range(0, len(crops), BATCH):
            request = pb_utils.InferenceRequest(
                model_name=self.embedder,
                requested_output_names=names,
                inputs=[pb_utils.Tensor("face", crops[start : start + BATCH])],
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            )
            answer = request.exec()
            if answer.has_error():
                raise Failed(f"{self.embedder}: {answer.error().message()}")
            for name in names:
                parts[name].append(pb_utils.get_output_tensor_by_name(answer, name).as_numpy())
        if not len(crops):
            none = {"embedding": np.empty((0, 0), np.float32), "norm": np.empty((0, 1), np.float32)}
            return {**none, "contract": np.empty((0, 4), np.int32)}
        return {name: np.concatenate(found) for name, found in parts.items()}


class WrongCall(Exception):
    """It is the request that cannot be answered, whatever the photo."""


class Failed(Exception):
    """The photo was right, but `arcface` did not answer."""


class Asked:
    """The parameters of a request: min_score, min_size, max_faces, crop, detector; numbers may come as text.

    `probe`: only whether this process answers; the image is not looked at, and nothing is counted.
    """

    def __init__(self, request, max_faces):
        """Read and check them."""
        told = json.loads(request.parameters() or "{}")
        self.min_score = _number(told, "min_score", MIN_SCORE, 0.01, 0.99)
        self.min_size = _number(told, "min_size", MIN_SIZE, 1, 1e5)
        self.max_faces = int(_number(told, "max_faces", max_faces, 1, max_faces))
        said = {key for key in ("crop", "detector", "probe") if str(told.get(key, "")).lower() in ("true", "1", "yes")}
        self.probe = "probe" in said
        self.not_asked_for = {"crop", "detector"} - said  # outputs


class Meter:
    """What Triton's metrics show of this model: photos, faces, refusals and microseconds by stage.

    To tell Triton a number takes as long as to align a face, so a thread tells it the sums of `TELL_EVERY_S`.
    """

    def __init__(self):
        """Register the families; they are shared with the other instances."""
        counter, histogram = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.HISTOGRAM
        make = pb_utils.MetricFamily
        photos = make(name="arcface_photos", description="photos, by what became of them", kind=counter)
        faces = make(name="arcface_photo_faces", description="faces a photo", kind=histogram)
        stages = make(name="arcface_photo_stage_us", description="microseconds spent on photos, by stage", kind=counter)
        self.families = (photos, faces, stages)  # kept alive: a metric ends with its family
        self.counters = {end: photos.Metric(labels={"outcome": end}) for end in ("answered", "refused")}
        self.counters |= {stage: stages.Metric(labels={"stage": stage}) for stage in STAGES}
        self.faces = faces.Metric(labels={"model": "photo_faces"}, buckets=FACES)
        self.lock, self.something, self.ended = threading.Lock(), threading.Event(), threading.Event()
        self.sums, self.seen = Counter(), []
        self.thread = threading.Thread(target=self._tell_now_and_then, daemon=True)
        self.thread.start()

    def add(self, name, amount=1):
        """So many photos with an outcome, or microseconds of a stage."""
        with self.lock:
            self.sums[name] += amount
        self.something.set()

    def answered(self, faces):
        """One photo with so many faces."""
        with self.lock:
            self.seen.append(faces)
        self.add("answered")

    @contextmanager
    def stage(self, name):
        """Adds the time spent within."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter_ns() - start_ns) / 1000)

    def close(self):
        """Tell what is left, and end."""
        self.ended.set()
        self.something.set()
        self.thread.join()

    def _tell_now_and_then(self):
        while not self.ended.is_set():
            self.something.wait()
            self.ended.wait(TELL_EVERY_S)
            self.something.clear()
            with self.lock:
                sums, seen = self.sums, self.seen
                self.sums, self.seen = Counter(), []
            for name, amount in sums.items():
                self.counters[name].increment(amount)
            for faces in seen:
                self.faces.observe(faces)


@contextmanager
def _ends_after(seconds):
    """Ends this process if what is within takes longer: a decoder that loops holds the interpreter's lock for good."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _bytes_of(image):
    if image.size != 1:
        raise WrongCall(f"image has shape {list(image.shape)}: expected [1], one photo a request")
    return bytes(image.reshape(-1)[0])


def _number(told, key, default, low, high):
    try:
        number = float(told.get(key, default))
    except (TypeError, ValueError):
        number = float("nan")
    if not low <= number <= high:
        raise WrongCall(f"{key} is {told[key]!r}{NUMBER_EXPECTED}{low:g}..{high:g}")
    return number


def _detector(folder, threads):
    """The detector in a version folder, its kind by manifest.json, and its sha256; a seam: see `Look` in detect.py."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise pb_utils.TritonModelException(f"no detector in {folder}: arcface import-detector FILE")
    file, kind = folder / "detector.onnx", json.loads(manifest.read_text())["detector"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if kind == "yunet":
        return open_yunet(str(file), threads), kind, sha256
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return Scrfd(ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])), kind, sha256


def _error(words, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, code))
