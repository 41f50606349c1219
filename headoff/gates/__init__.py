"""Head gates: which attention heads of a detector are on, off, or in between.

A gate multiplies a head's attention weights after softmax, with no renormalisation: 1 is on, 0 is off, fractions are
legal. People write what is *off*; attention callables take the gate: gate = 1 - off. Heads, layers and queries count
from 0.

- `Clause`: one statement: these heads, in these layers, for these queries, at one site.
- `Configuration`: a name and some clauses, whose gates multiply. It is independent of the detector.
- `HeadLayout`: the numbers of layers, heads and queries of a detector.
- `Gates`: a batch of configurations as tensors, made by `stack` for one layout.
- `kind_of` says whether configurations are a cumulative sweep, all single heads, or all subsets.
- `parse_configuration` reads a configuration from text, `Configuration.text` writes it.

Example:
    >>> gates = stack(cumulative(), HeadLayout())
    >>> gates.names[:3], gates.decoder_cross.shape
    (('none off', 'first 1 off', 'first 2 off'), torch.Size([9, 6, 1, 8]))
"""

from headoff.choices import DEFAULT_SITE, SITES, Site
from headoff.gates.batch import Gates, stack
from headoff.gates.clauses import Clause, HeadLayout, Heads, check_site_exists
from headoff.gates.configurations import (
    Configuration,
    all_subsets,
    cumulative,
    first_off,
    heads_off,
    last_off,
    layers_off,
    none_off,
    off_matrix,
    off_vector,
    only_heads_on,
    single_heads,
)
from headoff.gates.kinds import (
    CumulativeSweep,
    SingleHeadSweep,
    SubsetSweep,
    SweepKind,
    kind_of,
    order_of,
    sweeps_among,
)
from headoff.gates.orders import Order, check_order, order_by_score, random_order
from headoff.gates.parse import OrderResolver, parse_configuration, parse_order, read_configurations

__all__ = [
    "DEFAULT_SITE",
    "SITES",
    "Clause",
    "Configuration",
    "CumulativeSweep",
    "Gates",
    "HeadLayout",
    "Heads",
    "Order",
    "OrderResolver",
    "SingleHeadSweep",
    "Site",
    "SubsetSweep",
    "SweepKind",
    "all_subsets",
    "check_order",
    "check_site_exists",
    "cumulative",
    "first_off",
    "heads_off",
    "kind_of",
    "last_off",
    "layers_off",
    "none_off",
    "off_matrix",
    "off_vector",
    "only_heads_on",
    "order_by_score",
    "order_of",
    "parse_configuration",
    "parse_order",
    "random_order",
    "read_configurations",
    "single_heads",
    "stack",
    "sweeps_among",
]
