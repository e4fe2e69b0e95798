"""Compute the test metrics of a trained checkpoint.

python -m hpgr_plugin.evaluate --gin_config_file=configs/runs/ml-100k_finetune.gin
"""

from hpgr_plugin.cli import run_app

if __name__ == "__main__":
    run_app(mode="evaluate")
