"""Stage 1 alone: masked item modelling, written as a hand-over for stage 2.

python -m hpgr_plugin.pretrain --gin_config_file=configs/runs/ml-100k_pretrain.gin
"""

from hpgr_plugin.cli import run_app


def main() -> None:
    from hpgr_plugin.hosts.embedded.run import run

    run(mode="pretrain")


if __name__ == "__main__":
    run_app(main)
