"""HSTU layers as formulas on the padded torch backend of `hstu_attention`."""

from hpgr_plugin.ops.hstu_attention.torch import hstu_attention
from hpgr_plugin.ops.hstu_layer.layer import PlainLayers

_LAYERS = PlainLayers(hstu_attention)
hstu_layer = _LAYERS.hstu_layer
hstu_last_layer = _LAYERS.hstu_last_layer
candidate_layer = _LAYERS.candidate_layer
