"""Train one stage; see vita_audio/cli/finetune.py."""

from vita_audio.cli.finetune import main

if __name__ == "__main__":
    main()
