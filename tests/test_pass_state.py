"""What a checkpoint of a pass holds, from strangers: damaged or forged, it is refused in words."""

from __future__ import annotations

import json

import passes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import FILE

from hgprompt.checkpoint import PassCheckpoint
from hgprompt.errors import DataError, FileFormatError, HGPromptError, OptionError
from hgprompt.files import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint of a pass, its bytes, and its identity."""
    folder = tmp_path_factory.mktemp("written")
    passes.interrupt(folder, keep="moments", head=passes.head())
    identity = read_safetensors(folder / FILE)[1]["identity"]
    return folder, (folder / FILE).read_bytes(), identity


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_other_byte_is_refused(written, data):
    folder, content, identity = written
    kind = data.draw(st.sampled_from(["change", "truncate", "append", "replace"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "change":
        hostile = bytearray(content)
        hostile[at] ^= data.draw(st.integers(1, 255))
    elif kind == "truncate":
        hostile = content[:at]
    elif kind == "append":
        hostile = content + data.draw(st.binary(min_size=1, max_size=100))
    else:
        hostile = data.draw(st.binary(max_size=200))
    (folder / FILE).write_bytes(bytes(hostile))
    try:
        with pytest.raises(HGPromptError):
            PassCheckpoint(folder, identity)
    finally:
        (folder / FILE).write_bytes(content)
    PassCheckpoint(folder, identity)


FORGERIES = {
    "no batches": lambda t, m: t.pop("batches"),
    "no batch": lambda t, m: t.update(batches=t["batches"][:0]),
    "a negative batch": lambda t, m: t["batches"][0].neg_(),
    "flat batches": lambda t, m: t.update(batches=t["batches"].flatten()),
    "no rows": lambda t, m: t.pop("moments.0.rows.0"),
    "rows of another shape": lambda t, m: t.update({"moments.1.rows.1": t["moments.1.rows.1"][:-1]}),
    "NaN": lambda t, m: t["moments.1.sums"].fill_(torch.nan),
    "half the digits": lambda t, m: t.update({"moments.1.sums": t["moments.1.sums"].float()}),
    "other classes": lambda t, m: t["moments.0.classes"].add_(1),
    "a class twice": lambda t, m: t["moments.0.classes"].fill_(0),
    "gradients of other prompts": lambda t, m: t.update(gradients=t["gradients"][:, :2]),
    "infinite gradients": lambda t, m: t["gradients"].fill_(torch.inf),
    "gradients of too many images": lambda t, m: m.update(num_gradient_images=10**9),
    "gradients of -1 images": lambda t, m: m.update(num_gradient_images=-1),
    "gradients of no number": lambda t, m: m.update(num_gradient_images=[1]),
    "gradients of nothing": lambda t, m: t.pop("gradients"),
    "something more": lambda t, m: t.update(more=torch.zeros(3)),
    "features as well": lambda t, m: t.update({"features": torch.zeros(3), "features.sizes": torch.tensor([1])}),
    "another version": lambda t, m: m.update(version=99),
    "another format": lambda t, m: m.update(format="hgprompt-pool"),
    "no identity": lambda t, m: m.update(identity=[1, 2]),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_content_is_refused(forgery, written, tmp_path):
    """With a checksum that is right: the checks behind it."""
    tensors, metadata = read_safetensors(written[0] / FILE, checksum=True)
    FORGERIES[forgery](tensors, metadata)
    write_safetensors(tmp_path / FILE, {k: v.contiguous() for k, v in tensors.items()}, metadata, checksum=True)
    with pytest.raises((FileFormatError, OptionError, DataError)) as caught:
        passes.run(passes.batches(), tmp_path, keep="moments", head=passes.head())
    assert FILE in str(caught.value)


@pytest.mark.parametrize("change", [{"format": "hgprompt-pool"}, {"version": 99}, {"identity": {"seed": 1}}, {}])
def test_of_another_pass_only_the_header_is_read(change, written, tmp_path):
    """The file's body lacks its checksum, which is looked at before any tensor is: only its own pass gets so far."""
    metadata = {"format": "hgprompt-pass", "version": 2, "identity": written[2]} | change
    entries = {"features": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}}
    header = json.dumps(entries | {"__metadata__": {"hgprompt": json.dumps(metadata)}}).encode()
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with pytest.raises(HGPromptError, match="another pass|no checkpoint of" if change else "checksum"):
        PassCheckpoint(tmp_path, written[2])


def _forged_sizes(sizes):
    return lambda t: t.update({"features.sizes": sizes})


@pytest.mark.parametrize(
    "forge",
    [
        _forged_sizes(torch.tensor([24])[:0]),
        _forged_sizes(torch.tensor([-6, 30])),
        _forged_sizes(torch.tensor([2**62, 2**62, 2**62, 2**62, 24])),
        _forged_sizes(torch.tensor(24)),
        _forged_sizes(torch.tensor([24.0])),
        lambda t: t.pop("features.sizes"),
        lambda t: t.update(features=t["features"].double()),
        lambda t: t.update(features=t["features"][:-1]),
        lambda t: t.pop("sample"),
        lambda t: t.update(sample=t["sample"][:-1]),
        lambda t: t.pop("looks.bounds"),
        lambda t: t["looks.bounds"].fill_(torch.nan),
        lambda t: t["looks.images"].fill_(10**6),
        lambda t: t.update({"looks.weights": t["looks.weights"][:, :2]}),
        lambda t: t.update({"looks.images": torch.tensor(3)}),
    ],
)
def test_forged_features_and_looks_are_refused(forge, tmp_path, monkeypatch):
    monkeypatch.setattr("hgprompt.stopping.FIRST", 6)
    options = {"tolerance": 1e-9, "keep": "features"}
    passes.interrupt(tmp_path, **options)
    tensors, metadata = read_safetensors(tmp_path / FILE, checksum=True)
    assert len(tensors["looks.images"]) > 0
    forge(tensors)
    write_safetensors(tmp_path / FILE, {k: v.contiguous() for k, v in tensors.items()}, metadata, checksum=True)
    with pytest.raises(FileFormatError, match="no whole checkpoint"):
        passes.run(passes.batches(), tmp_path, **options)
