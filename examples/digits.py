"""Binary images for the examples: scikit-learn's digits, or a folder of MNIST's idx files."""

import gzip
import pathlib

import numpy as np


def read_idx(path):
    """The array in an idx file, which may be compressed by gzip."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    num_axes = content[3]
    shape = np.frombuffer(content, ">i4", count=num_axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def load(folder=None, seed=0):
    """(training images, their labels, test images, their labels), binary, of shape [n, h, w].

    Pixels are grey levels; each is drawn once, with its level as the probability of 1.
    """
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.images))
        images, labels = digits.images[order] / 16, digits.target[order]
        parts = [images[:1500], labels[:1500], images[1500:], labels[1500:]]
    else:
        parts = []
        for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
            found = sorted(pathlib.Path(folder).glob(f"{name}*idx*"))
            if not found:
                raise FileNotFoundError(f"no file {name}-idx?-ubyte(.gz) in {folder}")
            part = read_idx(found[0])
            parts.append(part / np.float32(255) if "images" in name else part)
    rng = np.random.default_rng(seed)
    for index in (0, 2):
        drawn = rng.random(parts[index].shape, np.float32) < parts[index]
        parts[index] = drawn.astype(np.uint8)
    return parts
