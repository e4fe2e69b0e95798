"""The paper's rivals that are not stacks of token layers: DNN, MoE, GRU4Rec, and so on.

Each is one file with one `RivalEncoder`, bound as a class:
`hpgr.HSTURanker.encoder = @hpgr.SASRec`. The ranker gives it the tokens that HSTU reads (items,
actions, features), and its head, loss and training are those of every other model. HSTU and MTGR
are layers, `hpgr.HSTURanker.layer`.
"""
