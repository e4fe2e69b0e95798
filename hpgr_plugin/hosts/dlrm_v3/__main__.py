"""Start the host's ranking trainer with any .gin file.

python -m hpgr_plugin.hosts.dlrm_v3 --gin_config_file=FILE [--mode=train-eval]
"""

from hpgr_plugin.hosts.dlrm_v3.launch import main

if __name__ == "__main__":
    main()
