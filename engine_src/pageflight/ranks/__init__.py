"""Several processes that run one model: started, told, listened to, watched, and in one process group."""
