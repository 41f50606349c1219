"""What a head that is off contributes instead of its context: context' = g A V + (1 - g) r.

- `zero`: r = 0, the head gate alone. It asks whether the rest can do without the head, but leaves the residual stream
  off its distribution.
- `mean`: the head's mean context over a reference set, for each object query (for the encoder: over all tokens).
- `resample`: the head's context in another image, for the same query.
- `uniform`: attention spread evenly over all keys without padding; needs no reference set.
- `optimal`: the constant, for all queries, under which a value changes least (Li and Janson, "Optimal ablation for
  interpretability", NeurIPS 2024, arXiv 2409.09951), fitted on a reference set.

No kind is best everywhere (Pochinkov et al., arXiv 2408.17322), so report zero and at least one other. Gates decide, as
ever, in which layers, heads and queries, and by which fraction, r comes in; the attention callable knows nothing of it.
In a relevance map r is constant: what replaces a head carries no relevance.
"""

from headoff.ablation.kinds import Ablation, ablation_draws, make_ablation
from headoff.ablation.optimal import fit_optimal
from headoff.ablation.references import References, gather_references, load_references

__all__ = [
    "Ablation",
    "References",
    "ablation_draws",
    "fit_optimal",
    "gather_references",
    "load_references",
    "make_ablation",
]
