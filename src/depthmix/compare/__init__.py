"""Compare tuning methods: methods x seeds x tasks, each run cached, with paired intervals."""
