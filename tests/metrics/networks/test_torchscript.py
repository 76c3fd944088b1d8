"""TorchScript archives: the tensors that torch.jit.load gives, and none of the code that it runs."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metrics.networks import torchscript
from metrics.networks.inception import open_inception_weights
from metrics.networks.torchscript import is_archive, read_state
from metrics.networks.weight_files import WeightsFile
from runtime.config import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Inner(nn.Module):
    """Every attribute that a pickle of a module may hold, tensors that are no state among them."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(24.0)
        self.register_buffer("view", base.view(4, 6).t()[1:, ::2])
        self.register_buffer("rest", base[5:9])
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_buffer("none", None)
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.tied = self.weight
        self.plain = torch.zeros(3)
        self.sizes, self.ratios, self.flags, self.tensors = [1, 2], [1.0, 2.0], [True], [torch.zeros(2)]
        self.table = {"a": torch.zeros(1)}
        self.device = torch.device("cpu")

    def forward(self, x: Tensor) -> Tensor:
        other = self.plain.sum() + self.tensors[0].sum() + self.table["a"].sum() + self.sizes[0] + self.ratios[0]
        return x.to(self.device) + self.view.sum() + other + int(self.flags[0])


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Inner()
        self.again = self.inner
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.register_buffer("number", torch.tensor(3))
        self.register_buffer("rounded", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("truth", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("repeated", torch.full((1,), 7.0).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.inner(x).sum()


class WritesInForward(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, self.path)
        return x


class Writes(WritesInForward):
    """A module that restores itself, and leaves a file wherever that happens."""

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(state[0], self.path)


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


def repacked(source: Path, target: Path, entry: str, change: Callable[[bytes], bytes]) -> Path:
    """The archive with one of its entries, of any folder, changed."""
    changed = 0
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if re.fullmatch(rf"[^/]+/{entry}", name):
                content, changed = change(content), changed + 1
            new.writestr(name, content)
    assert changed
    return target


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that one side alone has or that are not the same in type, layout or numbers."""
    names = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        layouts = [(tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in (one, other)]
        if layouts[0] != layouts[1] or not torch.equal(one, other):
            names.append(name)
    return names


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return saved(Outer(), tmp_path_factory.mktemp("archive") / "outer.pt")


def test_the_tensors_are_those_of_torch(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = dict(torch.jit.load(archive).state_dict())
    monkeypatch.setattr(torch.jit, "load", None)
    ours = read_state(archive)
    assert differences(ours, theirs) == []
    assert {"inner.view", "again.tied", "layers.1.num_batches_tracked", "repeated", "empty"} <= ours.keys()
    assert not {"inner.plain", "inner.none", "inner.tensors"} & ours.keys()
    assert not ours["inner.view"].is_contiguous()
    assert ours["inner.rest"].storage_offset() == 5
    storages = [ours[name].untyped_storage().data_ptr() for name in ("inner.view", "again.rest", "inner.tied")]
    assert storages[0] == storages[1] != storages[2]


def test_a_traced_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2))).eval()
    torch.jit.trace(module, torch.zeros(1, 1, 4, 4)).save(tmp_path / "traced.pt")
    theirs = dict(torch.jit.load(tmp_path / "traced.pt").state_dict())
    assert differences(read_state(tmp_path / "traced.pt"), theirs) == []


def test_archives_from_before_buffers_were_listed(archive: Path, tmp_path: Path) -> None:
    def older(source: bytes) -> bytes:
        return re.sub(rb"  __buffers__ = .*\n", b"", source)

    path = repacked(archive, tmp_path / "older.pt", r"code/.*\.py", older)
    assert differences(read_state(path), dict(torch.jit.load(path).state_dict())) == []


@pytest.mark.parametrize("bug", ["every tensor is state", "strides are left out"])
def test_a_wrong_reader_is_caught(bug: str, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = dict(torch.jit.load(archive).state_dict())
    if bug == "every tensor is state":
        everything = {"plain", *(name.rpartition(".")[2] for name in theirs)}
        monkeypatch.setattr(torchscript._Content, "_parameters_and_buffers", lambda self, name: everything)
        assert "inner.plain" in differences(read_state(archive), theirs)
    else:
        monkeypatch.setattr(torchscript._Content, "_tensor", lambda self, view: (
            self._numbers(view.storage)[view.offset :][: torch.Size(view.shape).numel()]))  # fmt: skip
        assert "inner.view" in differences(read_state(archive), theirs)


def test_code_of_an_archive_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "written"
    path = saved(Writes(str(target)), tmp_path / "writes.pt")
    target.unlink(missing_ok=True)
    torch.jit.load(path)
    assert target.exists()  # what must not happen
    target.unlink()
    with pytest.raises(pickle.UnpicklingError, match=r"Writes restores itself by code"):
        read_state(path)
    with pytest.raises(InputError, match="holds no PyTorch weights, or something beside them"):
        open_inception_weights(WeightsFile(path, "0" * 64), "torch-fidelity", torch.device("cpu"))
    other = saved(WritesInForward(str(target)), tmp_path / "forward.pt")
    assert list(read_state(other)) == ["weight"]
    assert not target.exists()


class Shell:
    """Pickled, it is a call of os.system."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, (self._command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_in_the_pickle_are_refused(protocol: int, archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"
    call = pickle.dumps(Shell(f"touch {target}"), protocol)
    path = repacked(archive, tmp_path / "shell.pt", r"data\.pkl", lambda content: call)
    with pytest.raises(pickle.UnpicklingError, match="system is more than data"):
        read_state(path)
    with pytest.raises(InputError, match="holds no PyTorch weights, or something beside them"):
        open_inception_weights(WeightsFile(path, "0" * 64), "torch-fidelity", torch.device("cpu"))
    assert not target.exists()
    pickle.loads(call)
    assert target.exists()  # what must not happen


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "torch load", "torch._utils _rebuild_tensor",
                                  "copyreg _reconstructor", "metrics.networks.torchscript _Object"])  # fmt: skip
def test_every_other_name_is_refused(name: str, archive: Path, tmp_path: Path) -> None:
    module, _, attribute = name.partition(" ")
    text = f"c{module}\n{attribute}\n.".encode()
    path = repacked(archive, tmp_path / "name.pt", r"data\.pkl", lambda content: text)
    with pytest.raises(pickle.UnpicklingError, match=f"{attribute} is more than data"):
        read_state(path)


def test_a_pickle_changes_nothing_that_outlives_it(archive: Path, tmp_path: Path) -> None:
    """Its BUILD sets attributes of whatever object it is given: names of ours and of torch's must not be among them."""
    for name in [*(" ".join(known) for known in torchscript._PLAIN), "torch._utils _rebuild_tensor_v2", "__torch__ Outer"]:
        module, _, attribute = name.partition(" ")
        for state in (b"}Vplanted\nI1\ns", b"(N}Vplanted\nI1\nst"):  # {"planted": 1}, and (None, {"planted": 1})
            text = f"c{module}\n{attribute}\n".encode() + state + b"b."
            path = repacked(archive, tmp_path / "build.pt", r"data\.pkl", lambda content, text=text: text)
            with pytest.raises((pickle.UnpicklingError, AttributeError, TypeError)):
                read_state(path)
    known = [torchscript._Object, torchscript._View, torchscript._Storage, torchscript._Unpickler, *torchscript._PLAIN.values()]
    assert not any(hasattr(thing, "planted") for thing in [*known, torch.FloatStorage, torch._utils._rebuild_tensor_v2])


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "numbers cut short": (r"data/0", lambda content: content[:-4]),
    "pickle cut short": (r"data\.pkl", lambda content: content[: len(content) // 2]),
    "big-endian": ("byteorder", lambda content: b"big"),
    "offsets outside": (r"data\.pkl", lambda content: content.replace(b"K\x05(K\x04t", b"K\x50(K\x04t")),
    "no module": (r"data\.pkl", lambda content: b"(d."),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives_are_named(damage: str, archive: Path, tmp_path: Path) -> None:
    entry, change = DAMAGES[damage]
    with zipfile.ZipFile(archive) as content:
        before = content.read(next(name for name in content.namelist() if re.fullmatch(rf"[^/]+/{entry}", name)))
    assert change(before) != before
    path = repacked(archive, tmp_path / "damaged.pt", entry, change)
    with pytest.raises(InputError, match=r"damaged\.pt (cannot be read as|holds no) PyTorch weights") as raised:
        open_inception_weights(WeightsFile(path, "0" * 64), "torch-fidelity", torch.device("cpu"))
    assert "\n" not in str(raised.value)


def test_what_is_an_archive(archive: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    (tmp_path / "text.pt").write_text("text")
    assert is_archive(archive)
    assert not is_archive(tmp_path / "weights.pth")
    assert not is_archive(tmp_path / "text.pt")
