"""Runs what a run file asks for: pretrain, finetune, evaluate or an ablation.

python -m hpgr_plugin.main --gin_config_file=configs/runs/quickstart.gin
"""

from hpgr_plugin.cli import run_app


def main() -> None:
    from hpgr_plugin.hosts.embedded.run import run

    run()


if __name__ == "__main__":
    run_app(main)
