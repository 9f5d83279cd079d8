"""What messages call the options of sources: the key of the configuration, and the option of commands."""

IMAGE_COLUMN = "data.image_column (or --image-column of edt encode and edt data)"
LABEL_COLUMN = "data.label_column (or --label-column of edt encode and edt data)"
NO_LABEL_COLUMN = "to null (on the command line: none) to read no labels"
NO_LABELS = "data.label_column=null (or --label-column none of edt encode and edt data)"
SPLIT = "data.split, or --split of edt encode and edt data"
