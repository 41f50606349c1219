"""Finding attention callables by name, and adapting them to the contract."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import headoff
from headoff.attention import (
    AdaptedAttention,
    attention_label,
    attention_names,
    conform,
    eager,
    register_attention,
    resolve_attention,
    sdpa,
)
from headoff.attention import registry as registry_module
from headoff.errors import AttentionError

GOOD = """
from torch.nn.functional import scaled_dot_product_attention

def attention(query, key, value, attn_mask=None):
    return scaled_dot_product_attention(query, key, value, attn_mask)

class Kernels:
    fast = staticmethod(attention)

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory is empty, and what a test imports or registers is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(registry_module, "_registered", dict(registry_module._registered))
    monkeypatch.setattr(registry_module, "_labels", dict(registry_module._labels))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if origin.startswith(str(tmp_path)):
            del sys.modules[name]


def check(attention) -> None:
    """`attention` keeps the contract on one example with a mask and a gate."""
    query, key, value = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (4, 5, 5))
    mask = torch.tensor([[True, True, False, True, False]])
    gate = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)
    expected = eager(query, key, value, mask, head_gate=gate)
    torch.testing.assert_close(attention(query, key, value, mask, head_gate=gate), expected)
    torch.testing.assert_close(attention(query, key, value, attn_mask=mask, head_gate=gate), expected)
    torch.testing.assert_close(attention(query, key, value), eager(query, key, value))


def refusal(spec) -> str:
    """The message with which `spec` is rejected: one sentence on one line."""
    with pytest.raises(AttentionError) as caught:
        resolve_attention(spec)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert message.endswith(".")
    return message


# Names.


def test_built_in_names():
    assert attention_names()[:2] == ("eager", "sdpa")
    assert resolve_attention("eager") is eager
    assert resolve_attention("sdpa") is sdpa
    assert attention_label(sdpa) == "sdpa"


def test_registering():
    mine = register_attention("mine", scaled_dot_product_attention)
    check(mine)
    assert resolve_attention("mine") is mine
    assert attention_names()[-1] == "mine"
    assert attention_label(mine) == "mine"


@pytest.mark.parametrize("name", ["", "a:b"])
def test_names_that_cannot_be_registered(name):
    with pytest.raises(AttentionError, match="cannot be the name"):
        register_attention(name, eager)


def test_registering_what_does_not_conform():
    with pytest.raises(AttentionError, match="mine takes"):
        register_attention("mine", lambda query: query)
    assert "mine" not in attention_names()


@pytest.mark.parametrize("typo, name", [("spda", "sdpa"), ("eagr", "eager"), ("SDPA", None), ("", None)])
def test_unknown_names(typo, name):
    message = refusal(typo)
    assert f"there is no attention {typo!r}" in message
    assert "eager, sdpa" in message
    assert "path/to/file.py:name" in message
    assert ("did you mean" in message) == (name is not None)
    assert name is None or repr(name) in message


# Modules.


def test_module(folder):
    assert resolve_attention("headoff.attention.eager:eager") is eager
    check(resolve_attention("torch.nn.functional:scaled_dot_product_attention"))


def test_module_in_the_current_directory(folder):
    (folder / "kernels_of_mine.py").write_text(GOOD)
    path = list(sys.path)
    attention = resolve_attention("kernels_of_mine:attention")
    check(attention)
    assert attention_label(attention) == "kernels_of_mine:attention"
    assert sys.path == [*path, str(folder)]


def test_module_that_does_not_exist():
    assert "no module 'nowhere'" in refusal("nowhere.kernels:attention")
    assert "no module 'headoff.nowhere'" in refusal("headoff.nowhere:attention")


def test_module_that_imports_what_does_not_exist(folder):
    (folder / "needs_more.py").write_text("import nowhere_to_be_found\n")
    message = refusal("needs_more:attention")
    assert "needs_more.py, line 1" in message
    assert "install nowhere_to_be_found" in message


def test_member_that_does_not_exist():
    assert "did you mean 'eager'?" in refusal("headoff.attention:eagr")


# Files.


def test_file(folder):
    (folder / "kernel.py").write_text(GOOD)
    path = list(sys.path)
    attention = resolve_attention("kernel.py:attention")
    check(attention)
    assert attention_label(attention) == "kernel.py:attention"
    assert sys.path == [*path, str(folder)]
    assert "kernel" not in sys.modules


def test_file_by_other_paths(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "kernel.py").write_text(GOOD)
    check(resolve_attention("deep/kernel.py:attention"))
    check(resolve_attention(f"{folder}/deep/kernel.py:attention"))
    check(resolve_attention("./deep/../deep/kernel.py:attention"))


def test_dotted_name(folder):
    (folder / "kernel.py").write_text(GOOD)
    check(resolve_attention("kernel.py:Kernels.fast"))


def test_files_of_the_same_name_do_not_meet(folder):
    for number, name in enumerate(("one", "two")):
        (folder / name).mkdir()
        (folder / name / "kernel.py").write_text(f"{GOOD}\nattention.number = {number}\n")
    numbers = [resolve_attention(f"{name}/kernel.py:attention").call.number for name in ("one", "two")]
    assert numbers == [0, 1]


def test_file_is_executed_once_and_again_when_it_changed(folder):
    file = folder / "kernel.py"
    file.write_text(GOOD)
    first = resolve_attention("kernel.py:attention")
    assert resolve_attention("kernel.py:attention").call is first.call
    file.write_text(GOOD + "\nchanged = True\n")
    second = resolve_attention("kernel.py:attention")
    assert second.call is not first.call
    assert second.call.__module__ == first.call.__module__


@pytest.mark.parametrize("when", ["imported", "called"])
def test_file_imports_what_lies_beside_it(folder, when):
    (folder / "deep").mkdir()
    (folder / "deep" / "beside_the_kernel.py").write_text(GOOD)
    texts = {
        "imported": "from beside_the_kernel import attention\n",
        "called": "def attention(query, key, value, attn_mask=None):\n"
        "    import beside_the_kernel\n"
        "    return beside_the_kernel.attention(query, key, value, attn_mask)\n",
    }
    (folder / "deep" / "kernel.py").write_text(texts[when])
    for _ in range(2):
        check(resolve_attention("deep/kernel.py:attention"))
    assert sys.path.count(str(folder / "deep")) == 1


def test_file_with_a_dataclass(folder):
    (folder / "kernel.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from headoff.attention import eager\n"
        "@dataclass\nclass Kernel:\n    warps: int = 4\n"
        "    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):\n"
        "        return eager(query, key, value, attn_mask, head_gate=head_gate)\n"
        "attention = Kernel()\n"
    )
    attention = resolve_attention("kernel.py:attention")
    check(attention)
    assert attention_label(attention) == "kernel.py:attention"


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("kernle.py:attention", ["kernle.py does not exist", "did you mean 'kernel.py'?"]),
        ("nowhere/kernel.py:attention", ["does not exist, nor does its folder"]),
        ("folder.py:attention", ["folder.py is not a Python file"]),
        ("./notes.txt:attention", ["notes.txt is not a Python file"]),
        ("kernel.py", ["does not say which function", "'kernel.py:name'"]),
        ("C:\\kernel.py", ["does not say which function"]),
        ("kernel.py:", ["write one of eager, sdpa"]),
        (":attention", ["write one of eager, sdpa"]),
        ("kernel.py:atention", ["kernel.py has no 'atention'", "did you mean 'attention'?"]),
        ("kernel.py:zzz", ["kernel.py has no 'zzz'", "it defines Kernels, attention"]),
        ("kernel.py:Kernels.fats", ["has no 'fats'", "did you mean 'fast'?"]),
        ("kernel.py:Kernels", ["kernel.py:Kernels is a class", "instance"]),
        ("kernel.py:number", ["kernel.py:number cannot be called"]),
    ],
)
def test_files_that_cannot_be_used(folder, spec, parts):
    (folder / "kernel.py").write_text(GOOD)
    (folder / "notes.txt").touch()
    (folder / "folder.py").mkdir()
    message = refusal(spec)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("x = 1\ndef attention(:\n", ["kernel.py, line 2: SyntaxError"]),
        ("def f():\nreturn 1\n", ["kernel.py, line 2: IndentationError"]),
        (
            "def f():\n    return 1 / 0\n\nf()\n",
            ["kernel.py, line 2, raised ZeroDivisionError: division by zero"],
        ),
        ("\nraise ValueError('two\\nlines')\n", ["kernel.py, line 2, raised ValueError: two lines"]),
        ("raise RuntimeError\n", ["line 1, raised RuntimeError while it was imported"]),
        ("import json\njson.loads('{')\n", ["kernel.py, line 2, raised JSONDecodeError"]),
        ("import sys\nsys.exit(3)\n", ["line 2, raised SystemExit: 3"]),
        ("import nowhere_to_be_found\n", ["line 1", "install nowhere_to_be_found"]),
        ("from . import other\n", ["line 1", "ImportError", "'package.module:name'"]),
        ("import broken_beside\n", ["broken_beside.py, line 1: SyntaxError"]),
        ("x = '\0'\n", ["kernel.py", "null bytes"]),  # a ValueError before Python 3.11.4
    ],
)
def test_files_that_fail_at_import(folder, text, parts):
    (folder / "kernel.py").write_text(text)
    (folder / "broken_beside.py").write_text("def (\n")
    modules, path = set(sys.modules), list(sys.path)
    message = refusal("kernel.py:attention")
    assert all(part in message for part in parts), message
    assert not [name for name in set(sys.modules) - modules if name.startswith("headoff_attention")]
    assert sys.path == path


def test_file_can_be_mended(folder):
    (folder / "kernel.py").write_text("def (")
    refusal("kernel.py:attention")
    (folder / "kernel.py").write_text(GOOD)
    check(resolve_attention("kernel.py:attention"))


# Callables.


def contract(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def mask_elsewhere(query, key, value, scale=1.0, *, attn_mask=None, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def mask_by_another_name(q, k, v, mask=None, head_gate=None):
    return eager(q, k, v, mask, head_gate=head_gate)


def plain(q, k, v, attn_mask=None, dropout_p=0.0):
    return eager(q, k, v, attn_mask)


def plain_positional(q, k, v, bias, /):
    return eager(q, k, v, bias)


def plain_keyword(q, k, v, causal=False, mask=None):
    return eager(q, k, v, mask)


def anything(*args, **kwargs):
    return eager(*args, **kwargs)


def by_keywords(q, k, v, **kwargs):
    return eager(q, k, v, **kwargs)


def with_more(q, k, v, causal, scale, attn_mask=None):
    return eager(q, k, v, attn_mask)


class Instance:
    def __call__(self, query, key, value, attn_mask=None):
        return eager(query, key, value, attn_mask)

    def method(self, query, key, value, attn_mask=None, *, head_gate=None):
        return eager(query, key, value, attn_mask, head_gate=head_gate)


class Module(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return eager(query, key, value, mask)


class GatedModule(nn.Module):
    def forward(self, query, key, value, attn_mask=None, *, head_gate=None):
        return eager(query, key, value, attn_mask, head_gate=head_gate)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask=None, scale=None):
        return eager(query, key, value, attn_mask)


class SetUpFunction(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, attn_mask=None):
        return eager(query, key, value, attn_mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


@pytest.mark.parametrize(
    "attention",
    [
        contract,
        anything,
        by_keywords,
        mask_elsewhere,
        mask_by_another_name,
        plain,
        plain_positional,
        plain_keyword,
        scaled_dot_product_attention,
        functools.partial(plain, dropout_p=0.0),
        functools.partial(with_more, causal=False, scale=None),
        functools.partial(contract),
        Instance(),
        Instance().method,
        Module(),
        GatedModule(),
        Function.apply,
        SetUpFunction.apply,
        lambda query, key, value, attn_mask: eager(query, key, value, attn_mask),
    ],
    ids=attention_label,
)
def test_callables_that_can_be_used(attention):
    check(resolve_attention(attention))


@pytest.mark.parametrize("module", [Module, GatedModule])
def test_compiled_modules_are_seen_through(module):
    check(resolve_attention(torch.compile(module(), backend="eager")))


@pytest.mark.parametrize("attention", [contract, anything, Instance().method, GatedModule(), eager, sdpa])
def test_what_keeps_the_contract_is_left_alone(attention):
    assert resolve_attention(attention) is attention


def test_adapting_twice_changes_nothing():
    adapted = resolve_attention(plain)
    assert resolve_attention(adapted) is adapted


@pytest.mark.parametrize("attention", [plain, Module(), Function.apply])
def test_a_plain_callable_never_sees_the_gate(attention):
    adapted = resolve_attention(attention)
    assert isinstance(adapted, AdaptedAttention)
    assert not adapted.takes_gate


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return q


def triton_tutorial(q, k, v, causal, sm_scale):
    return q


class Needy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        return query


@pytest.mark.parametrize(
    "attention, parts",
    [
        (lambda query, key, value: query, ["(query, key, value)", "attn_mask=None"]),
        (lambda query: query, ["(query)", "no place for the mask"]),
        (lambda: None, ["()"]),
        (flash, ["flash takes (q, k, v, dropout_p=0.0", "no place for the mask"]),
        (triton_tutorial, ["cannot be called as (query, key, value, attn_mask)", "'sm_scale'", "partial"]),
        (with_more, ["cannot be called as (query, key, value, attn_mask)", "'causal'", "partial"]),
        (lambda *, query, key, value, attn_mask: query, ["cannot be called as"]),
        (Needy.apply, ["(query, key, value, /)", "no place for the mask"]),
        (nn.Identity(), ["(input)"]),
        (Instance, ["Instance is a class: pass an instance"]),
        (3, ["3 cannot be called", "head_gate=None"]),
        (None, ["None cannot be called"]),
    ],
)
def test_callables_that_cannot_be_used(attention, parts):
    message = refusal(attention)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "returned, part",
    [
        (lambda query: (query, None), "returned a tuple"),
        (lambda query: query.transpose(1, 2), "shape (2, 4, 3, 8) for a query of shape (2, 3, 4, 8)"),
    ],
)
def test_a_context_of_another_shape_is_rejected(returned, part):
    attention = conform(lambda query, key, value, attn_mask: returned(query), "mine")
    query = torch.randn(2, 3, 4, 8)
    with pytest.raises(AttentionError, match="^mine returned") as caught:
        attention(query, query, query, head_gate=torch.ones(1, 3, 1, 1))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "attention, label",
    [
        (eager, "eager"),
        (scaled_dot_product_attention, "torch._C._nn:scaled_dot_product_attention"),
        (plain, f"{__name__}:plain"),
        (functools.partial(plain, dropout_p=0.0), f"partial({__name__}:plain)"),
        (Instance(), f"{__name__}:Instance"),
        (conform(plain, "mine"), "mine"),
    ],
)
def test_labels(attention, label):
    assert attention_label(attention) == label


def test_label_of_what_a_file_made(folder):
    (folder / "kernel.py").write_text(GOOD)
    resolve_attention("kernel.py:attention")
    module = sys.modules[resolve_attention("kernel.py:attention").call.__module__]
    assert attention_label(module.Kernels()) == "kernel.py:Kernels"


def test_auto_is_sdpa_and_cannot_be_replaced():
    assert resolve_attention("auto") is sdpa
    assert headoff.load("scenes").attention is sdpa
    with pytest.raises(AttentionError, match="'auto' cannot be the name"):
        register_attention("auto", sdpa)
