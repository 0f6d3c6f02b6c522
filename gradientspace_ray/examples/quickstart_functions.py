"""The Python tasks of the built-in mixture."""

import re

ARGUMENTS = ("text", "numbers", "mapping", "n")
"""What a function takes, by the name its body uses: a string, a list of numbers, a dictionary, or a number."""


def source_code(name: str, body: str) -> str:
    """The whole definition of a task's function."""
    argument = next(argument for argument in ARGUMENTS if re.search(rf"\b{argument}\b", body))
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"def {name}({argument}):\n{lines}"


# Name, what the function does, body.
FUNCTIONS: tuple[tuple[str, str, str], ...] = (
    ("reverse_words", "reverses the order of the words in a sentence", "return ' '.join(text.split()[::-1])"),
    ("count_vowels", "counts the vowels in a string", "return sum(c in 'aeiou' for c in text.lower())"),
    ("is_palindrome", "tells whether a string reads the same backwards", "return text == text[::-1]"),
    ("capitalize_each", "capitalizes the first letter of each word", "return text.title()"),
    ("remove_spaces", "removes all spaces from a string", "return text.replace(' ', '')"),
    ("longest_word", "returns the longest word of a sentence", "return max(text.split(), key=len)"),
    ("char_counts", "counts how often each character occurs", "return {c: text.count(c) for c in set(text)}"),
    ("first_letters", "joins the first letters of the words", "return ''.join(word[0] for word in text.split())"),
    ("strip_digits", "drops every digit from a string", "return ''.join(c for c in text if not c.isdigit())"),
    ("swap_case", "swaps upper and lower case", "return text.swapcase()"),
    ("sorted_letters", "sorts the letters of a word", "return ''.join(sorted(text))"),
    ("count_lines", "counts the lines of a text", "return len(text.splitlines())"),
    ("every_second", "keeps every second character", "return text[::2]"),
    ("unique_words", "returns the set of words in lower case", "return set(text.lower().split())"),
    ("word_lengths", "maps each word to its length", "return {word: len(word) for word in text.split()}"),
    ("only_letters", "keeps the letters and nothing else", "return ''.join(filter(str.isalpha, text))"),
    ("sum_list", "adds up the numbers of a list", "total = 0\nfor x in numbers:\n    total += x\nreturn total"),
    ("mean", "computes the mean of a list of numbers", "return sum(numbers) / len(numbers)"),
    (
        "largest",
        "finds the largest number without max",
        "best = numbers[0]\nfor x in numbers:\n    if x > best:\n        best = x\nreturn best",
    ),
    ("second_largest", "returns the second largest distinct number", "return sorted(set(numbers))[-2]"),
    ("evens", "keeps the even numbers of a list", "return [x for x in numbers if x % 2 == 0]"),
    ("odds_squared", "squares the odd numbers of a list", "return [x * x for x in numbers if x % 2]"),
    ("count_positive", "counts the positive numbers", "return sum(x > 0 for x in numbers)"),
    (
        "running_total",
        "returns the running totals of a list",
        "out, total = [], 0\nfor x in numbers:\n    total += x\n    out.append(total)\nreturn out",
    ),
    ("dedupe", "removes duplicates but keeps the order", "return list(dict.fromkeys(numbers))"),
    ("rotate_left", "rotates a list by one place to the left", "return numbers[1:] + numbers[:1]"),
    (
        "is_sorted",
        "checks that a list is in ascending order",
        "return all(a <= b for a, b in zip(numbers, numbers[1:]))",
    ),
    ("product", "multiplies all numbers of a list", "result = 1\nfor x in numbers:\n    result *= x\nreturn result"),
    ("range_width", "returns the gap between the largest and smallest number", "return max(numbers) - min(numbers)"),
    ("median", "finds the median of an odd number of values", "return sorted(numbers)[len(numbers) // 2]"),
    (
        "differences",
        "lists the differences of neighbouring numbers",
        "return [b - a for a, b in zip(numbers, numbers[1:])]",
    ),
    ("pairs", "returns all pairs of neighbours", "return list(zip(numbers, numbers[1:]))"),
    ("index_of_max", "returns the position of the largest number", "return numbers.index(max(numbers))"),
    ("clip_negative", "replaces negative numbers by zero", "return [max(0, x) for x in numbers]"),
    ("most_common", "returns the most common element", "return max(set(numbers), key=numbers.count)"),
    (
        "split_half",
        "splits a list into two halves",
        "middle = len(numbers) // 2\nreturn numbers[:middle], numbers[middle:]",
    ),
    ("interleave_zero", "puts a zero after every number", "out = []\nfor x in numbers:\n    out += [x, 0]\nreturn out"),
    ("last_three", "returns the last three elements", "return numbers[-3:]"),
    ("factorial", "computes the factorial of n by recursion", "return 1 if n < 2 else n * factorial(n - 1)"),
    (
        "fibonacci",
        "returns the n-th Fibonacci number",
        "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
    ),
    (
        "is_prime",
        "checks whether n is a prime number",
        "if n < 2:\n    return False\nreturn all(n % d for d in range(2, int(n**0.5) + 1))",
    ),
    ("digit_sum", "adds the digits of n", "return sum(int(d) for d in str(abs(n)))"),
    ("is_leap_year", "tells whether the year n is a leap year", "return n % 4 == 0 and (n % 100 != 0 or n % 400 == 0)"),
    (
        "collatz_steps",
        "counts the Collatz steps from n to 1",
        "steps = 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nreturn steps",
    ),
    ("divisors", "lists the divisors of n", "return [d for d in range(1, n + 1) if n % d == 0]"),
    ("to_binary", "writes n in binary without the prefix", "return bin(n)[2:]"),
    ("is_square", "tests whether n is a perfect square", "root = int(n**0.5)\nreturn root * root == n"),
    ("countdown", "returns the list from n down to 1", "return list(range(n, 0, -1))"),
    ("triangle", "computes the n-th triangular number", "return n * (n + 1) // 2"),
    (
        "fizzbuzz",
        "returns Fizz, Buzz, FizzBuzz or n itself",
        "if n % 15 == 0:\n    return 'FizzBuzz'\nif n % 3 == 0:\n    return 'Fizz'\nreturn 'Buzz' if n % 5 == 0 else n",
    ),
    (
        "gcd_with_12",
        "finds the greatest common divisor of n and 12",
        "a, b = n, 12\nwhile b:\n    a, b = b, a % b\nreturn a",
    ),
    ("reverse_digits", "reverses the digits of n", "return int(str(n)[::-1])"),
    ("next_multiple", "rounds n up to a multiple of ten", "return -(-n // 10) * 10"),
    ("power_of_two", "tells whether n is a power of two", "return n > 0 and n & (n - 1) == 0"),
    ("sum_of_squares", "adds the squares from 1 to n", "return sum(i * i for i in range(1, n + 1))"),
    ("harmonic", "computes the n-th harmonic number", "return sum(1 / k for k in range(1, n + 1))"),
    ("times_table", "returns the first ten multiples of n", "return [n * i for i in range(1, 11)]"),
    ("parity", "returns 'even' or 'odd' for n", "return 'odd' if n % 2 else 'even'"),
    ("celsius", "converts n degrees Fahrenheit to Celsius", "return (n - 32) * 5 / 9"),
    ("minutes_seconds", "splits n seconds into minutes and seconds", "return divmod(n, 60)"),
    ("stars", "returns a string of n stars", "return '*' * n"),
    ("invert", "swaps the keys and values of a dictionary", "return {value: key for key, value in mapping.items()}"),
    ("largest_key", "returns the key with the largest value", "return max(mapping, key=mapping.get)"),
    ("drop_small", "keeps the entries whose value is above ten", "return {k: v for k, v in mapping.items() if v > 10}"),
    ("total_value", "adds all values of a dictionary", "return sum(mapping.values())"),
    ("sorted_keys", "lists the keys in alphabetical order", "return sorted(mapping)"),
    ("add_one", "raises every value of a dictionary by one", "return {k: v + 1 for k, v in mapping.items()}"),
    (
        "by_value",
        "sorts the entries of a dictionary by value",
        "return sorted(mapping.items(), key=lambda item: item[1])",
    ),
)
