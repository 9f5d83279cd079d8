"""Where the time and the memory of sampling go on this machine: by stage and kind of block, and by step."""
