"""What is learned: data, loss, evaluation and presentation of one kind of task each."""
