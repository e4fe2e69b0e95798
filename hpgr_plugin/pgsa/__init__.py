"""Preference-guided sparse attention (PGSA, Eq. 5), as a plan that any HSTU attention can run.

HSTU attention is pointwise, without a softmax over the row:

    o_i = sum_j SiLU(q_i . k_j + b_ij) / n * M_j * v_j

and M_j depends on the column alone. So masking the scores is scaling the values, v_j' = M_j v_j,
and a column with M_j = 0 reaches no row of any layer. When only the candidate's output is read,
such tokens can be dropped before the first layer and nothing changes but floating-point order,
provided that what belongs to the full sequence stays its own: positions and times are encoded
before dropping, and 1/n keeps the full n. The cost of a candidate falls from O(N^2) to O(m^2),
m <= K (2 r + 1) + recent, where r is the radius at which the Gaussian falls below eps.

The identity is for M outside the activation (`apply="post"`). With it inside (`"pre"`),
SiLU(M_j s) is no scaling of the values, but M_j = 0 still gives SiLU(0) = 0: dropping stays
exact, the kernel just has to multiply the scores.

    plan.py     which tokens a candidate keeps, and their weights: a PreferencePlan (preferences.py)
    compact.py  the short sequences of the "sequence" scope
    hooks.py    what fills the attention_hook slot
    naive.py    the ground truth of all of it
"""

from hpgr_plugin.pgsa.compact import CompactSequences, compact_sequences, gather_tokens
from hpgr_plugin.pgsa.hooks import AttentionHook, PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.pgsa.plan import plan_preferences
from hpgr_plugin.pgsa.preferences import PreferencePlan

__all__ = [
    "AttentionHook",
    "CompactSequences",
    "PreferenceGuidedSparseAttention",
    "PreferencePlan",
    "StochasticLength",
    "compact_sequences",
    "gather_tokens",
    "plan_preferences",
]
