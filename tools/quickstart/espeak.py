"""The speech synthesiser espeak-ng, as a Python package or as a program.

The pip package ``espeakng-loader`` provides the shared library and its data, without root access; it is called
through its C interface. Otherwise the ``espeak-ng`` program on PATH is run once per utterance.

    python tools/quickstart/espeak.py                  # check for a synthesiser; if there is none, say what to install
    python tools/quickstart/espeak.py VOICE OUT TEXT   # speak a text into a WAV file
"""

from __future__ import annotations

import ctypes
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

INSTALL_HINT = (
    "no speech synthesiser: run 'pip install espeakng-loader', or install the system's espeak-ng "
    "(Debian and Ubuntu: apt install espeak-ng)"
)

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS, _CHARS_UTF8, _RATE, _PITCH = 2, 1, 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_RANDOM_SEED = 1


@dataclass(frozen=True)
class Voice:
    """How to speak.

    Attributes:
        name: name in espeak-ng, such as ``"en-us+f2"``: language and variant.
        words_per_minute: 80 to 450.
        pitch: 0 to 99.
    """

    name: str
    words_per_minute: int = 170
    pitch: int = 50


class SynthesiserError(ValueError):
    """espeak-ng is missing or refuses; the message says what to do."""


def open_synthesiser() -> Synthesiser:
    """The library if it is installed, else the program.

    Raises:
        SynthesiserError: neither is installed.
    """
    try:
        import espeakng_loader
    except ImportError:
        espeakng_loader = None
    if espeakng_loader is not None:
        try:
            return LibrarySynthesiser(espeakng_loader.get_library_path(), espeakng_loader.get_data_path())
        except (OSError, RuntimeError) as error:
            if not shutil.which("espeak-ng"):
                raise SynthesiserError(f"espeakng-loader is installed but does not load: {error}") from error
    if program := shutil.which("espeak-ng"):
        return ProgramSynthesiser(program)
    raise SynthesiserError(INSTALL_HINT)


class LibrarySynthesiser:
    """espeak-ng in this process.

    The library keeps state from one utterance to the next, so the same text may give different
    samples. The state survives ``fork``: a child that inherits an unused synthesiser always starts from the
    same state.
    """

    def __init__(self, library: str, data: str):
        self._library = ctypes.CDLL(library)
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0)
        if self.sample_rate <= 0:
            raise OSError(f"{library} finds no data in {data}")
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._collect)  # kept alive here: the library holds only the pointer
        self._library.espeak_SetSynthCallback(self._callback)
        if hasattr(self._library, "espeak_ng_SetRandSeed"):
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(_RANDOM_SEED))

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """Samples at ``sample_rate``, float32 in [-1, 1].

        Raises:
            SynthesiserError: the voice is unknown.
        """
        if self._library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise SynthesiserError(f"espeak-ng has no voice {voice.name!r}")
        self._library.espeak_SetParameter(_RATE, voice.words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(encoded, len(encoded), 0, 0, 0, _CHARS_UTF8, None, None)
        if status != 0 or not self._chunks:
            raise SynthesiserError(f"espeak-ng cannot synthesise {text!r} (status {status})")
        return np.concatenate(self._chunks).astype(np.float32) / 32768

    def _collect(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


class ProgramSynthesiser:
    """espeak-ng as a program on PATH."""

    def __init__(self, program: str):
        self._program = program
        _, self.sample_rate = self._run("a", Voice("en-us"))

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """Samples at ``sample_rate``, float32 in [-1, 1].

        Raises:
            SynthesiserError: the program fails; its own message is included.
        """
        return self._run(text, voice)[0]

    def _run(self, text: str, voice: Voice) -> tuple[np.ndarray, int]:
        speed, pitch = str(voice.words_per_minute), str(voice.pitch)
        command = [self._program, "--stdout", "-v", voice.name, "-s", speed, "-p", pitch, text]
        result = subprocess.run(command, capture_output=True, check=False)
        if result.returncode or not result.stdout:
            message = result.stderr.decode(errors="replace").strip()
            raise SynthesiserError(f"{self._program} cannot synthesise {text!r}: {message}")
        return soundfile.read(io.BytesIO(result.stdout), dtype="float32")


Synthesiser = LibrarySynthesiser | ProgramSynthesiser


if __name__ == "__main__":
    try:
        synthesiser = open_synthesiser()
        if len(sys.argv) == 4:
            voice, out, text = sys.argv[1:]
            soundfile.write(out, synthesiser.speak(text, Voice(voice)), synthesiser.sample_rate)
    except SynthesiserError as error:
        sys.exit(f"error: {error}")
