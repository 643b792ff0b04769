"""The paper's tables and figures as commands, its numbers beside ours."""
