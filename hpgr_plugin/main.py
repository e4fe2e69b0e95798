"""Run what `hpgr.run.mode` names: pretrain, finetune, evaluate or an ablation.

python -m hpgr_plugin.main --gin_config_file=configs/runs/quickstart.gin
"""

from hpgr_plugin.cli import run_app

if __name__ == "__main__":
    run_app()
