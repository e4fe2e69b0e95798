"""Numbers that the paper (arXiv 2603.00980) prints or plots, on its own industrial log."""

# Table 2 and Figure 4: scope of the row -> AUC.
AUC = {
    "dnn": 0.7923,
    "moe": 0.8024,
    "gru4rec": 0.8146,
    "bert4rec": 0.8145,
    "sasrec": 0.8194,
    "wukong": 0.8167,
    "hstu": 0.8220,
    "mtgr": 0.8253,
    "base": 0.8327,
    "pgsa": 0.8348,
    "sem": 0.8374,
    "full": 0.8377,
}
# Figure 6: K -> AUC.
TOP_K = {
    30: 0.8361,
    35: 0.8367,
    40: 0.8367,
    45: 0.8371,
    50: 0.8377,
    55: 0.8370,
    60: 0.8371,
    65: 0.8369,
    70: 0.8370,
    75: 0.8367,
}
# Figure 7, read off the plot.
HISTORY = {
    50: 0.8275,
    100: 0.8308,
    150: 0.8325,
    200: 0.8337,
    250: 0.8349,
    300: 0.8352,
    350: 0.8370,
    400: 0.8377,
}
DEPTH = {
    "d=128": {4: 0.8283, 8: 0.8361, 16: 0.8369, 32: 0.8377},
    "d=64": {4: 0.8275, 8: 0.8308, 16: 0.8360, 32: 0.8373},
}
# Figure 8: seconds per step.
STEP = {
    "training": {"MTGR": 0.95, "HPGR": 1.64},
    "inference": {"MTGR": 0.72, "HPGR": 1.47},
}
