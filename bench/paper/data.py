"""Labelled images: scikit-learn's digits, and MNIST, Fashion-MNIST and CIFAR-10 from a folder."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hypergrad_ext.demo.data import Examples, Split, all_digits

NAMES = ("digits", "mnist", "fashion", "cifar10")

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_TITLES = {"digits": "digits", "mnist": "MNIST", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "."),
    "fashion": ("fashion_mnist", "FashionMNIST/raw", "."),
    "cifar10": ("cifar10", "cifar-10-batches-py", "."),
}
_TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10"}


class DataError(RuntimeError):
    """Data that are not there, or are not what their name says; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """A set of images that are read, or decoded, when they are asked for.

    Attributes:
        y: All labels.
        pixels: From indices to images ``(n, channels, height, width)`` in [0, 1], float32.
    """

    y: Tensor
    pixels: Callable[[Tensor], Tensor]

    def take(self, index: Tensor) -> Examples:
        """The examples at ``index``."""
        return Examples(self.pixels(index), self.y[index])


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        name: What a table calls it.
        shape: Channels, height and width.
        train: What may be trained and validated on.
        test: The official test set; None where there is none, and `split` makes one of what is left.
    """

    name: str
    shape: tuple[int, int, int]
    train: Part
    test: Part | None

    def split(self, seed: int, *, train: int, validation: int | None = None, test: int | None = None) -> Split:
        """Draw disjoint sets at random.

        Args:
            seed: Seed of the shuffle.
            train: Number of training examples.
            validation: Number of validation examples; None for all that are left.
            test: Number of test examples at the most; None for all. Without an official test set they are what
                is left, and ``validation`` must be given.

        Returns:
            The three sets, float32, on the CPU.

        Raises:
            DataError: If there are not so many.
        """
        total = len(self.train.y)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(total, generator=generator)
        rest = total - train
        if validation is None and self.test is None:
            raise DataError(f"validation: expected a number for {self.name}, which has no test set of its own")
        validation = rest if validation is None else validation
        if validation > rest or (self.test is None and validation == rest):
            raise DataError(
                f"{self.name}: expected at most {total} examples, got {train} + {validation} and a test set"
            )
        a, b = order[:train], order[train : train + validation]
        if self.test is None:
            last, index = self.train, order[train + validation :]
        else:
            last, index = self.test, torch.randperm(len(self.test.y), generator=generator)
        return Split(self.train.take(a), self.train.take(b), last.take(index[:test]))


def load(name: str, folder: Path | None = None, *, download: bool = False) -> Images:
    """A data set by name.

    Args:
        name: One of `NAMES`.
        folder: Where the files are: in a folder of the data set's name, in the layout of torchvision, or directly.
        download: Let torchvision download what is not there.

    Returns:
        The data set.

    Raises:
        DataError: If the files are not there or cannot be read.
    """
    if name not in NAMES:
        raise DataError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        return _digits()
    reader = _cifar if name == "cifar10" else _idx_images
    found = None if folder is None else reader(name, folder)
    if found is None and download:
        folder = Path("data") if folder is None else folder
        _download(name, folder)
        found = reader(name, folder)
    if found is None:
        files = "cifar-10-batches-py/data_batch_1 ..." if name == "cifar10" else f"{_IDX[0]}[.gz] ..."
        where = "no --data-dir was given" if folder is None else f"not found in {folder}, nor in its folders "
        where += "" if folder is None else " or ".join(_FOLDERS[name][:-1])
        raise DataError(
            f"{_TITLES[name]}: {where}; expected {files}: pass --data-dir DIR, or --download, which uses torchvision"
        )
    return found


def _digits() -> Images:
    try:
        everything = all_digits()
    except ImportError as error:
        raise DataError("digits: scikit-learn is not installed: pip install scikit-learn") from error
    x = everything.x.float().view(-1, 1, 8, 8)
    return Images("digits", (1, 8, 8), Part(everything.y, lambda index: x[index]), None)


def _idx_images(name: str, folder: Path) -> Images | None:
    for inner in _FOLDERS[name]:
        paths = [_plain_or_zipped(folder / inner, file) for file in _IDX]
        present = [path for path in paths if path is not None]
        if len(present) == len(_IDX):
            parts = [_idx_part(*present[:2]), _idx_part(*present[2:])]
            return Images(_TITLES[name], (1, 28, 28), *parts)
        if present:
            raise DataError(f"{_TITLES[name]}: {folder / inner} holds {len(present)} of the files {', '.join(_IDX)}")
    return None


def _plain_or_zipped(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def _idx_part(images: Path, labels: Path) -> Part:
    x, y = _read_idx(images, 3), _read_idx(labels, 1)
    if len(x) != len(y):
        raise DataError(f"{labels}: expected {len(x)} labels, as {images.name} has images, got {len(y)}")
    return Part(y.long(), lambda index: x[index][:, None] / 255)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """LeCun's format: two zero bytes, the type (8: uint8), the number of dimensions, each big-endian, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise DataError(f"{path}: expected an idx file of uint8 with {dimensions} dimensions, got {content[:4]!r}")
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(content) != start + int(np.prod(shape)):
        raise DataError(f"{path}: expected {np.prod(shape)} bytes for shape {tuple(shape)}, got {len(content) - start}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _cifar(name: str, folder: Path) -> Images | None:
    for inner in _FOLDERS[name]:
        batches = [folder / inner / f"data_batch_{i}" for i in range(1, 6)]
        if batches[0].is_file():
            return Images(_TITLES[name], (3, 32, 32), _batches(batches), _batches([folder / inner / "test_batch"]))
        packed = folder / inner / "cifar10_jpeg.npz"
        if packed.is_file():
            # A lossy copy: whoever quotes a number of it must be able to tell.
            return Images(f"{_TITLES[name]} (JPEG copy)", (3, 32, 32), _jpegs(packed, "train"), _jpegs(packed, "test"))
    return None


class _OnlyArrays(pickle.Unpickler):
    """Unpickles arrays and containers; any other name in a file is refused, since a pickle can run code."""

    _ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self._ALLOWED or name == "_reconstruct" and module.startswith("numpy"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a file of images")


def _batches(paths: Sequence[Path]) -> Part:
    """Torchvision's and Krizhevsky's format: a pickled dict with ``data``, ``(n, 3072)``, and ``labels``."""
    x, y = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _OnlyArrays(file, encoding="bytes").load()
            x.append(torch.from_numpy(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)))
            y.append(torch.tensor(batch[b"labels"]))
        except (OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise DataError(f"{path}: expected a batch of CIFAR-10 in its Python version: {error!r}") from error
    images, labels = torch.cat(x), torch.cat(y)
    return Part(labels, lambda index: images[index] / 255)


def _jpegs(path: Path, split: str) -> Part:
    """All JPEG files one after another, with their offsets: decoded when asked for."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path}: Pillow is not installed, which decodes it: pip install pillow") from error
    try:
        with np.load(path, allow_pickle=False) as file:
            content, offsets = file[f"{split}_jpeg"].tobytes(), file[f"{split}_offsets"].tolist()
            labels = torch.from_numpy(file[f"{split}_labels"]).long()
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: expected arrays {split}_jpeg, {split}_offsets, {split}_labels: {error}") from error

    def pixels(index: Tensor) -> Tensor:
        pictures = [np.asarray(Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]]))) for i in index.tolist()]
        stacked = np.stack(pictures) if pictures else np.empty((0, 32, 32, 3), np.uint8)
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous() / 255

    return Part(labels, pixels)


def _download(name: str, folder: Path) -> None:
    try:
        # An import of a torchvision built for another torch fails in many ways.
        from torchvision import datasets
    except Exception as error:
        raise DataError(
            f"{_TITLES[name]}: --download needs a torchvision that works with this torch ({error}); "
            "download the files yourself and pass --data-dir"
        ) from error
    try:
        for train in (True, False):
            getattr(datasets, _TORCHVISION[name])(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{_TITLES[name]}: torchvision could not download it into {folder}: {error}") from error
