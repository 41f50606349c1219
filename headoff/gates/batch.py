"""Batches of configurations as tensors, for one detector."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.choices import SITES, Site
from headoff.errors import GateError
from headoff.gates.clauses import HeadLayout
from headoff.gates.configurations import Configuration
from headoff.gates.validation import check_site


@dataclass(frozen=True, eq=False)
class Gates:
    """A batch of C configurations for one detector.

    Attributes:
        names: C names.
        encoder_self, decoder_self, decoder_cross: the gates at that site, (C, layers, queries, heads), or
            (C, layers, 1, heads) if they are the same for all queries; float32 unless `to` changed it; None if
            everything is on.

    Raises:
        GateError: there are no names, or a tensor has another shape.
    """

    names: tuple[str, ...]
    encoder_self: Tensor | None = None
    decoder_self: Tensor | None = None
    decoder_cross: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names:
            raise GateError(
                "a batch of gates cannot be empty: give at least one configuration, e.g. none_off()"
            )
        for site in SITES:
            gate = self.site(site)
            if gate is not None and (gate.ndim != 4 or len(gate) != len(self.names)):
                raise GateError(
                    f"the gates at {site} have the shape {tuple(gate.shape)}: it must be "
                    f"({len(self.names)}, layers, queries or 1, heads)"
                )

    def __len__(self) -> int:
        """C, the number of configurations."""
        return len(self.names)

    def site(self, name: Site) -> Tensor | None:
        """The gates at one site."""
        gate: Tensor | None = getattr(self, check_site(name))
        return gate

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Gates":
        """The same gates on another device or in another dtype; None means no change."""
        return self._map(lambda gate: gate.to(device=device, dtype=dtype or gate.dtype), self.names)

    def __getitem__(self, index: "int | slice | Sequence[int] | Tensor") -> "Gates":
        """Some of the configurations.

        Args:
            index: a number (for a batch of one), a slice, a sequence or tensor of numbers, or a bool mask (C,).

        Raises:
            IndexError: a number is too large.
            GateError: no configuration is selected.
        """
        everything = torch.arange(len(self))
        if isinstance(index, slice):
            chosen = torch.tensor(everything.tolist()[index], dtype=torch.long)
        else:
            which = torch.as_tensor(index, device="cpu")
            chosen = everything[which if which.numel() else which.long()].reshape(-1)
        names = tuple(self.names[i] for i in chosen.tolist())
        return self._map(lambda gate: gate[chosen.to(gate.device)], names)

    def _map(self, change: Callable[[Tensor], Tensor], names: tuple[str, ...]) -> "Gates":
        gates = (self.site(site) for site in SITES)
        return Gates(names, *(None if gate is None else change(gate) for gate in gates))


def stack(configurations: Iterable[Configuration], layout: HeadLayout) -> Gates:
    """The gates of some configurations as one batch, for a detector of this layout.

    Raises:
        GateError: there is no configuration, two have the same name, or one does not fit the layout.
    """
    configurations = tuple(configurations)
    names = tuple(configuration.name for configuration in configurations)
    for name, count in Counter(names).items():
        if count > 1:
            raise GateError(
                f"{count} configurations are named '{name}': leave out all but one, or give them other names"
            )
    sites: list[Tensor | None] = []
    for site in SITES:
        gates = [configuration.gate(site, layout) for configuration in configurations]
        touched = [gate for gate in gates if gate is not None]
        if not touched:
            sites.append(None)
            continue
        rows = max(gate.shape[1] for gate in touched)
        on = torch.ones(layout.layers(site), rows, layout.heads_at(site))
        sites.append(torch.stack([on if gate is None else gate.expand_as(on) for gate in gates]))
    return Gates(names, *sites)
