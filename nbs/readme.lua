-- README.md lies one folder above the landing page it is made from:
-- what it links to and shows is reached through nbs/.
local function from_the_top(target)
  if target:match('^%a[%w+.-]*:') or target:match('^[#/]') or target:match('^nbs/') then
    return target
  end
  return 'nbs/' .. target
end

function Link(link)
  link.target = from_the_top(link.target)
  return link
end

function Image(image)
  image.src = from_the_top(image.src)
  return image
end
