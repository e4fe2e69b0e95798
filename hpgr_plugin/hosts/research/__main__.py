"""Start the host's retrieval trainer, or stage 1 over its data sets, from any .gin file.

python -m hpgr_plugin.hosts.research --gin_config_file=FILE [--mode=train|pretrain]

With a GPU `--mode=train` is what the host's own main.py does; without one it trains on the CPU,
whether or not the host can do that by itself.
"""

from hpgr_plugin.hosts.research.launch import main

if __name__ == "__main__":
    main()
