from tests.golden import FILE, write

if __name__ == "__main__":
    write()
    print(f"wrote {FILE}; say in the commit what changed the numbers")
