"""The commands that serve and measure, one file each: what they are asked, what runs, what people see."""
