"""What ranks run, in threads, in processes and on GPUs: functions of importable modules, so that a process can be sent their names."""
