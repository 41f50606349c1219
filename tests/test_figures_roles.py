"""Pictures of roles: their numbers and frames are those that were measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from headoff import sample_image
from headoff.cli import main
from headoff.figures.roles import plot_attention, plot_effects
from headoff.importance.attention import STATISTICS
from headoff.importance.roles import ROLES, HeadRoles, MeanOverImages


@pytest.fixture
def found():
    generator = np.random.default_rng(0)

    def estimate(*shape):
        mean = generator.normal(size=shape)
        return MeanOverImages(mean, mean - 0.1, mean + 0.1, np.full(shape, 0.01))

    return HeadRoles(
        "decoder_cross", (2, 4), 9, 20, "zero",
        {role.value: estimate(2, 4) for role in ROLES},
        {role.value: estimate(4) for role in ROLES},
        {name: estimate(2, 4) for name in STATISTICS},
        None, None, None,
    )  # fmt: skip


def test_effects_have_their_numbers_and_a_frame_for_each_supported_role(found):
    figure = plot_effects(found)
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "head"]
    assert [ax.get_title(loc="left").split(":")[0] for ax in panels] == [role.name for role in ROLES]
    for ax, role in zip(panels, ROLES, strict=True):
        texts = [text.get_text() for text in ax.texts]
        assert len(texts) == 3 * 4
        value = found.effects[role.value].mean[1, 2]
        assert float(texts[1 * 4 + 2].replace("−", "-")) == pytest.approx(value, abs=0.06)
        frames = [p for p in ax.artists + ax.patches if isinstance(p, Rectangle) and p.get_width() == 0.92]
        supported = sum(role in found.roles(h, layer) for h in range(4) for layer in (0, 1, None))
        assert len(frames) == supported > 0


def test_attention_has_a_panel_for_each_statistic_shown(found):
    panels = [ax for ax in plot_attention(found).axes if ax.get_xlabel() == "head"]
    assert len(panels) == 6
    assert all(len(ax.texts) == 8 for ax in panels)


def test_the_command_writes_everything(tmp_path, capsys):
    images = [str(sample_image(number)) for number in (0, 1)]
    assert main(["roles", *images, "--out", str(tmp_path / "roles"), "--site", "decoder_self"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert sorted(path.name for path in (tmp_path / "roles").iterdir()) == [
        "effects.png", "index.html", "roles.csv", "roles.json",
    ]  # fmt: skip
    contents = json.loads((tmp_path / "roles" / "roles.json").read_text())
    assert contents["images"] == 2
    page = (tmp_path / "roles" / "index.html").read_text()
    assert page.count("<svg") == 1 and "head 7" in page and 'href="roles.csv"' in page
    assert contents["provenance"]["model"] == "scenes"
    assert main(["roles", images[0], "--out", str(tmp_path / "one")]) == 2
    assert "only 1 of 1 has an object" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()
