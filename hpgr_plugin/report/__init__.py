"""The paper's figures from finished runs, each as a png and a csv with its settings.

python -m hpgr_plugin.report figure4 --results results/ml-1m_ablation

One file per figure; `figure.py` is what they share, `paper.py` what the paper prints.
"""
