"""HSTU layers as formulas on the loops of `hstu_attention`: the reference."""

from hpgr_plugin.ops.hstu_attention.naive import hstu_attention
from hpgr_plugin.ops.hstu_layer.layer import PlainLayers

_LAYERS = PlainLayers(hstu_attention)
hstu_layer = _LAYERS.hstu_layer
hstu_last_layer = _LAYERS.hstu_last_layer
candidate_layer = _LAYERS.candidate_layer
