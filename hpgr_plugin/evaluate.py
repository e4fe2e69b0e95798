"""Figures of a trained checkpoint on the test split.

python -m hpgr_plugin.evaluate --gin_config_file=configs/runs/ml-100k_finetune.gin
"""

from hpgr_plugin.cli import run_app


def main() -> None:
    from hpgr_plugin.hosts.embedded.run import run

    run(mode="evaluate")


if __name__ == "__main__":
    run_app(main)
