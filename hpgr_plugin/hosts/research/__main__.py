"""Start the host's retrieval trainer, or stage 1 over its data sets, with any .gin file.

python -m hpgr_plugin.hosts.research --gin_config_file=FILE [--mode=train|pretrain]
"""

from hpgr_plugin.hosts.research.launch import main

if __name__ == "__main__":
    main()
