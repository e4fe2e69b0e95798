"""Run stage 1 only: train a masked item model and write its hand-over for stage 2.

python -m hpgr_plugin.pretrain --gin_config_file=configs/runs/ml-100k_pretrain.gin
"""

from hpgr_plugin.cli import run_app

if __name__ == "__main__":
    run_app(mode="pretrain")
