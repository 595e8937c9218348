"""Files of people: cells in every format that is read (`cell_files` is the door), and lists of labels."""
